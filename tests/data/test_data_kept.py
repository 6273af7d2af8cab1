"""Token ids kept in the cache: read instead of made, and never believed when they are not what was written."""

import os
import pickle
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ask, paint, write_rows

from onward import cache as cache_module
from onward.data import kept as kept_module
from onward.data.batches import eval_batches, step_batches
from onward.data.encode import Encoder, load_encoder
from onward.data.kept import KeptTokens
from onward.data.prepare import ResolvedSource, prepare
from onward.errors import DamageError

OPTIONS = {"max_length": 200, "overlong": "error", "loss_on": "assistant", "date": "2026-01-31"}
ROWS = [ask(f"Question {i}?", "a" * (i % 7 + 1)) for i in range(10)]


@pytest.fixture(scope="session")
def encoder(text_model):
    return load_encoder(text_model, **OPTIONS)


@pytest.fixture
def encoded(monkeypatch):
    """Every row that is encoded, by id."""
    seen = []
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, row, at: seen.append(at.sample_id) or real(self, row, at))
    return seen


def ready(path, encoder, rows=ROWS, **options):
    source = ResolvedSource(write_rows(path / "d.jsonl", rows), **options)
    return prepare([source], encoder, on_bad_sample="skip")


def inputs(data, encoder, workers=0):
    """All that the steps of two epochs are made of."""
    found = step_batches(
        data, encoder, batch_size=4, micro_batch_size=3, seed=5, stage="sft", first_step=1, last_step=6, workers=workers
    )
    return [
        (b.inputs, b.sample_ids, [{name: t.tolist() for name, t in m.items()} for m in b.micro_batches]) for b in found
    ]


def files() -> list[Path]:
    return sorted((Path(os.environ["ONWARD_CACHE"]) / "tokens").glob("*"))


@pytest.fixture
def anew(tmp_path, encoder, monkeypatch):
    """What the steps are without any cache."""
    monkeypatch.setenv("ONWARD_CACHE_TOKENS", "0")
    made = inputs(ready(tmp_path, encoder), encoder)
    assert files() == []
    monkeypatch.delenv("ONWARD_CACHE_TOKENS")
    for entry in (Path(os.environ["ONWARD_CACHE"]) / "measures").iterdir():
        entry.unlink()
    return made


def test_kept_ids_are_read_and_nothing_is_encoded(encoder, tmp_path, anew, encoded):
    data = ready(tmp_path, encoder)
    assert inputs(data, encoder) == anew
    assert inputs(data, encoder, workers=2) == anew
    again = ready(tmp_path, encoder)
    assert inputs(again, encoder) == anew and len(list(eval_batches(again, encoder, 4))) == 3
    assert inputs(pickle.loads(pickle.dumps(again)), encoder) == anew
    assert encoded == []


def test_turned_off_they_are_not_read_either(encoder, tmp_path, anew, encoded, monkeypatch):
    ready(tmp_path, encoder)
    monkeypatch.setenv("ONWARD_CACHE_TOKENS", "0")
    assert inputs(ready(tmp_path, encoder), encoder) == anew and len(encoded) == 20


def test_no_flipped_byte_is_trained_on(encoder, tmp_path, anew, encoded):
    """Whichever byte: of a place, of a digest, of an id. One row is made anew, or none where nothing reads the byte."""
    data = ready(tmp_path, encoder)
    (file,) = files()
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        encoded.clear()
        assert inputs(data, encoder) == anew
        assert len(set(encoded)) == 1 and len(encoded) == 2


def test_rows_and_files_are_not_taken_for_others(encoder, text_model, tmp_path, anew, encoded):
    data = ready(tmp_path, encoder)
    (file,) = files()
    whole = file.read_bytes()
    table = np.frombuffer(whole[:160], "<u8").reshape(10, 2)
    file.write_bytes(table[[7, 1, 2, 3, 4, 5, 6, 0, 8, 9]].tobytes() + whole[160:])  # two rows of one length
    assert inputs(data, encoder) == anew and set(encoded) == {"d.jsonl:1", "d.jsonl:8"}
    other = load_encoder(text_model, **{**OPTIONS, "loss_on": "all"})
    theirs = ready(tmp_path, other)
    (kept,) = {entry for entry in files() if entry != file}
    kept.write_bytes(whole)
    encoded.clear()
    learnt = [[micro["labels"] for micro in micros] for _, _, micros in inputs(theirs, other)]
    assert len(set(encoded)) == 10 and learnt != [[micro["labels"] for micro in micros] for _, _, micros in anew]


@pytest.mark.parametrize("left", [0, 7, 160, 300])
def test_deleted_cut_or_unreadable_while_it_is_in_use(encoder, tmp_path, anew, encoded, left):
    data = ready(tmp_path, encoder)
    assert inputs(data, encoder) == anew and encoded == []
    (file,) = files()
    os.truncate(file, left)
    assert inputs(data, encoder) == anew and len(encoded) >= 10
    file.unlink()
    data = ready(tmp_path, encoder)
    assert inputs(data, encoder) == anew
    file.mkdir()
    assert inputs(ready(tmp_path, encoder), encoder) == anew


def test_rows_with_images_and_augmented_ones_are_made_anew(llava_model, tmp_path, encoded):
    encoder = load_encoder(llava_model, **OPTIONS)
    paint(tmp_path / "red.png", "red")
    picture = ask([{"type": "image", "path": "red.png"}, {"type": "text", "text": "?"}], "Red.")
    inputs(ready(tmp_path, encoder, [picture, {"messages": []}, *ROWS]), encoder)
    assert set(encoded) == {"d.jsonl:1"} and encoded
    for path in files():
        path.unlink()
    inputs(ready(tmp_path, encoder, [picture]), encoder)
    assert files() == [], "a file without any tokens"
    encoded.clear()
    data = ready(tmp_path, encoder, ROWS, augment="augmentations:shout")
    assert files() == []
    inputs(data, encoder)
    assert len(set(encoded)) == 10
    encoded.clear()
    list(eval_batches(ready(tmp_path, encoder, [*ROWS, *ROWS]), encoder, 4))
    assert encoded == []


def test_a_file_that_changes_is_told_with_kept_ids_too(encoder, tmp_path):
    data = ready(tmp_path, encoder)
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DamageError, match="changed while it was in use"):
        inputs(data, encoder)


FULL = namedtuple("Usage", "free")(800)


@pytest.mark.parametrize("failing", ["pwrite", "fsync", "replace", "disk_usage", "mkdir"])
def test_a_disk_that_does_not_take_them_costs_time_alone(encoder, tmp_path, anew, encoded, monkeypatch, failing):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    fsync = os.fsync
    match failing:
        case "pwrite" | "fsync":
            monkeypatch.setattr(os, failing, fails)
        case "replace":
            monkeypatch.setattr(Path, "replace", fails)
        case "disk_usage":  # half of it is less than the tokens need
            monkeypatch.setattr(kept_module.shutil, "disk_usage", lambda _: FULL)
        case "mkdir":
            monkeypatch.setenv("ONWARD_CACHE", str(write_rows(tmp_path / "no-directory", [])))
    lines = []
    source = ResolvedSource(write_rows(tmp_path / "d.jsonl", ROWS))
    data = prepare([source], encoder, on_bad_sample="stop", progress=lines.append)
    monkeypatch.setattr(os, "fsync", fsync)
    assert [line for line in lines if "token ids are not kept (" in line and "each step makes its own" in line] == lines
    assert len(lines) == 1
    assert inputs(data, encoder) == anew
    assert not (tmp_path / "no-directory").is_dir() and (failing == "mkdir" or files() == [])


def test_an_error_in_a_row_leaves_nothing_behind(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ready(tmp_path, encoder)
    assert files() == []


def test_what_killed_writers_left_goes_and_what_others_write_stays(encoder, tmp_path, monkeypatch):
    folder = Path(os.environ["ONWARD_CACHE"]) / "tokens"
    theirs = cache_module.begin_file(folder / "theirs")
    (folder / ".partial-dead-1234").write_bytes(b"x" * 100)
    (folder / "old").write_bytes(b"x")
    os.utime(folder / "old", (1, 1))
    ready(tmp_path, encoder)
    assert {entry.name for entry in files() if len(entry.name) != 64} == {Path(theirs.name).name}
    cache_module.abandon_file(theirs)


@pytest.mark.parametrize(("vocabulary", "width"), [(1 << 15, 2), ((1 << 15) + 1, 4)])
def test_ids_of_every_size(vocabulary, width):
    kept = KeptTokens.of("key", 3, vocabulary)
    ids = np.array([0, 5, vocabulary - 1])
    trained = np.array([False, True, True])
    with kept.writing(print) as keep:
        keep(kept.pack(0, [(ids, trained), (np.array([1 << 31]), np.array([True]))]))
        keep(kept.pack(2, [(ids[::-1], ~trained)]))
    assert kept.path.stat().st_size == 3 * 16 + 2 * 3 * width
    for row, (expected, learnt) in ((0, (ids, trained)), (2, (ids[::-1], ~trained))):
        found = kept.read(row, 3)
        assert found[0].dtype == np.int64 and found[0].tolist() == expected.tolist()
        assert found[1].dtype == np.bool_ and found[1].tolist() == learnt.tolist()
    assert kept.read(1, 1) is None and kept.read(0, 2) is None and kept.read(3, 1) is None
