import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ask, paint, write_rows

from onward.data import prepare as prepare_module
from onward.data.encode import Encoder, load_encoder
from onward.data.prepare import ResolvedSource, prepare
from onward.errors import InputError, PlanError

OPTIONS = {"max_length": 100, "overlong": "error", "loss_on": "assistant", "date": "2026-01-31"}
GOOD = [ask(f"Question {i}?", "a" * (i + 1)) for i in range(10)]


@pytest.fixture(scope="session")
def encoder(text_model):
    return load_encoder(text_model, **OPTIONS)


@pytest.fixture
def measured(monkeypatch):
    """Every row that is measured, by id."""
    seen = []
    real = Encoder.measure
    monkeypatch.setattr(
        Encoder, "measure", lambda self, row, origin: seen.append(origin.sample_id) or real(self, row, origin)
    )
    return seen


def source(path, **options):
    return ResolvedSource(path, **options)


def test_every_row_is_measured_once_and_remembered(encoder, tmp_path, measured):
    path = write_rows(tmp_path / "d.jsonl", GOOD)
    data = prepare([source(path, repeat=2.5)], encoder, on_bad_sample="stop")
    lengths = [encoder.encode(row, data.sources[0].file.origin(i)) for i, row in enumerate(GOOD)]
    assert data.sources[0].tokens.tolist() == [len(sample.input_ids) for sample in lengths]
    assert data.sources[0].targets.tolist() == [sample.trained.sum() for sample in lengths]
    assert data.samples_per_epoch == 25 and data.rows == 10 and data.skipped == ()
    assert data.tokens_per_epoch == round(2.5 * sum(len(sample.input_ids) for sample in lengths))
    assert data.targets_per_epoch == round(2.5 * sum(int(sample.trained.sum()) for sample in lengths))
    assert data.longest == len(lengths[-1].input_ids)
    assert len(measured) == 10
    again = prepare([source(path, repeat=2.5)], encoder, on_bad_sample="stop")
    assert len(measured) == 10 and again.fingerprint == data.fingerprint
    assert np.array_equal(again.sources[0].tokens, data.sources[0].tokens)


def test_other_content_or_options_are_measured_anew(encoder, text_model, tmp_path, measured):
    path = write_rows(tmp_path / "d.jsonl", GOOD)
    prepare([source(path)], encoder, on_bad_sample="stop")
    prepare([source(path)], load_encoder(text_model, **{**OPTIONS, "loss_on": "all"}), on_bad_sample="stop")
    assert len(measured) == 20
    write_rows(path, GOOD[:-1])
    prepare([source(path)], encoder, on_bad_sample="stop")
    assert len(measured) == 29


def test_damaged_cache_is_measured_anew(encoder, tmp_path, measured):
    path = write_rows(tmp_path / "d.jsonl", GOOD)
    first = prepare([source(path)], encoder, on_bad_sample="stop")
    for entry in (Path(os.environ["ONWARD_CACHE"]) / "measures").iterdir():
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        entry.write_bytes(data)
    assert prepare([source(path)], encoder, on_bad_sample="stop").fingerprint == first.fingerprint
    assert len(measured) == 20


def test_bad_rows_stop_with_file_and_line(encoder, tmp_path):
    path = tmp_path / "d.jsonl"
    write_rows(path, GOOD)
    with path.open("a") as file:
        file.write("\nnot json\n" + '{"messages": []}\n' * 7)
    for _ in range(2):  # fresh, and remembered
        with pytest.raises(InputError, match="8 samples cannot be used") as caught:
            prepare([source(path)], encoder, on_bad_sample="stop")
        assert f"\n  {path}:12: not JSON" in caught.value.message and f"{path}:16: no messages" in caught.value.message
        assert f"{path}:17" not in caught.value.message and "and 3 more" in caught.value.message
        assert "on_bad_sample: skip" in caught.value.hint


def test_bad_rows_are_skipped_and_listed(encoder, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [GOOD[0], {"messages": []}, GOOD[1], {"x": 1}, GOOD[2]])
    data = prepare([source(path, repeat=2)], encoder, on_bad_sample="skip")
    assert [sample_id for sample_id, _ in data.skipped] == ["d.jsonl:2", "d.jsonl:4"]
    assert "this one has x" in dict(data.skipped)["d.jsonl:4"]
    assert data.samples_per_epoch == 6 and data.sources[0].used.tolist() == [0, 2, 4]
    draws = data.draws(0, np.arange(6), seed=1, stage="s")
    assert sorted(data.origin(draw).sample_id for draw in draws) == sorted(["d.jsonl:1", "d.jsonl:3", "d.jsonl:5"] * 2)
    assert all(data.row(draw) == GOOD[draw.row] for draw in draws)


@pytest.mark.parametrize("on_bad_sample", ["stop", "skip"])
def test_overlong(text_model, tmp_path, on_bad_sample):
    """error stops, whatever on_bad_sample says; drop leaves out and lists, whatever it says."""
    path = write_rows(tmp_path / "d.jsonl", [*GOOD, ask("a " * 300, "b")])

    def run(overlong):
        return prepare(
            [source(path)], load_encoder(text_model, **{**OPTIONS, "overlong": overlong}), on_bad_sample=on_bad_sample
        )

    with pytest.raises(InputError, match=r"d\.jsonl:11: \d+ tokens, max_length is 100") as caught:
        run("error")
    assert "overlong: drop or truncate" in caught.value.hint
    assert [sample_id for sample_id, _ in run("drop").skipped] == ["d.jsonl:11"]
    write_rows(path, [*GOOD, ask("a", "b " * 300)])
    assert run("truncate").longest == 100


def test_fingerprint_says_what_is_trained_on(encoder, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", GOOD)
    other = write_rows(tmp_path / "other.jsonl", GOOD[::-1])

    def fingerprint(*sources):
        return prepare(sources, encoder, on_bad_sample="skip").fingerprint

    base = fingerprint(source(path))
    moved = write_rows((tmp_path / "folder").mkdir() or tmp_path / "folder" / "e.jsonl", GOOD)
    assert fingerprint(source(moved)) == base
    different = [
        fingerprint(source(path, repeat=2)),
        fingerprint(source(other)),
        fingerprint(source(path), source(other)),
        fingerprint(source(other), source(path)),
    ]
    assert len({base, *different}) == 5


def test_fingerprint_depends_on_which_rows_are_used(text_model, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [*GOOD, ask("a " * 60, "b")])
    prints = []
    for max_length in (100, 110, 500):
        encoder = load_encoder(text_model, **{**OPTIONS, "max_length": max_length, "overlong": "drop"})
        prints.append(prepare([source(path)], encoder, on_bad_sample="stop").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_ids_tell_files_of_one_name_apart(encoder, tmp_path):
    paths = [(tmp_path / folder).mkdir() or write_rows(tmp_path / folder / "d.jsonl", GOOD) for folder in "ab"]
    data = prepare([source(path) for path in paths], encoder, on_bad_sample="stop")
    assert [s.file.origin(0).sample_id for s in data.sources] == ["a/d.jsonl:1", "b/d.jsonl:1"]


def test_sources_that_give_nothing(encoder, tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(InputError, match=r"empty.jsonl: is empty"):
        prepare([source(empty)], encoder, on_bad_sample="skip")
    few = write_rows(tmp_path / "few.jsonl", GOOD)
    with pytest.raises(InputError, match=r"10 of 10 rows are usable, repeat is 0\.01"):
        prepare([source(few, repeat=0.01)], encoder, on_bad_sample="skip")
    bad = write_rows(tmp_path / "bad.jsonl", [{}])
    with pytest.raises(InputError, match=r"0 of 1 rows are usable"):
        prepare([source(bad)], encoder, on_bad_sample="skip")


def test_missing_file_and_function(encoder, tmp_path):
    with pytest.raises(PlanError, match="no such data file"):
        prepare([source(tmp_path / "none.jsonl")], encoder, on_bad_sample="skip")
    path = write_rows(tmp_path / "d.jsonl", GOOD)
    for name in ("augmentations:none", "no_such_module:f", "augmentations", "augmentations:np"):
        with pytest.raises(PlanError, match=f"augment: {name}"):
            prepare([source(path, augment=name)], encoder, on_bad_sample="stop")


def test_images_are_part_of_the_data(llava_model, tmp_path, measured):
    encoder = load_encoder(llava_model, **OPTIONS)
    paint(tmp_path / "red.png", "red")
    row = ask([{"type": "image", "path": "red.png"}, {"type": "text", "text": "?"}], "Red.")
    path = write_rows(tmp_path / "d.jsonl", [row])
    first = prepare([source(path)], encoder, on_bad_sample="stop")
    assert (
        prepare([source(path)], encoder, on_bad_sample="stop").fingerprint == first.fingerprint and len(measured) == 1
    )
    paint(tmp_path / "red.png", "red", (300, 200))
    assert (
        prepare([source(path)], encoder, on_bad_sample="stop").fingerprint != first.fingerprint and len(measured) == 2
    )
    (tmp_path / "red.png").unlink()
    with pytest.raises(InputError, match=r"d\.jsonl:1: image .*red\.png is missing"):
        prepare([source(path)], encoder, on_bad_sample="stop")


def test_images_of_the_same_size_differ_by_their_bytes_where_the_source_says_so(llava_model, tmp_path):
    encoder = load_encoder(llava_model, **OPTIONS)
    row = ask([{"type": "image", "path": "red.png"}, {"type": "text", "text": "?"}], "Red.")
    path, image = write_rows(tmp_path / "d.jsonl", [row]), tmp_path / "red.png"

    def fingerprints():
        kinds = ("listing", "full")
        return [prepare([source(path, fingerprint=kind)], encoder, on_bad_sample="stop").fingerprint for kind in kinds]

    paint(image, "red")
    listing, full = fingerprints()
    assert listing != full
    assert fingerprints() == [listing, full]
    image.write_bytes(image.read_bytes()[:-1] + b"!")  # the last byte of a PNG's checksum of its end
    assert fingerprints()[0] == listing
    assert fingerprints()[1] != full


def test_progress(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "REPORT_EVERY", 0.0)
    lines = []
    prepare([source(write_rows(tmp_path / "d.jsonl", GOOD))], encoder, on_bad_sample="stop", progress=lines.append)
    assert lines[-1] == "d.jsonl: 10 of 10 rows measured"


def share(monkeypatch):
    """From now on two processes share the rows, three at a time."""
    monkeypatch.setattr(prepare_module, "SHARED", 1)
    monkeypatch.setattr(prepare_module, "CHUNK", 3)
    monkeypatch.setattr(prepare_module.torch, "get_num_threads", lambda: 2)


def test_processes_that_share_the_work_change_nothing(encoder, tmp_path, tmp_path_factory, monkeypatch, measured):
    path = write_rows(tmp_path / "d.jsonl", [*GOOD, {"messages": []}, *GOOD, {"x": 1}])
    alone = prepare([source(path)], encoder, on_bad_sample="skip")
    assert len(measured) == 22
    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path_factory.mktemp("other-cache")))
    share(monkeypatch)
    together = prepare([source(path)], encoder, on_bad_sample="skip")
    assert len(measured) == 22, "this process measured none of them"
    assert (together.fingerprint, together.skipped) == (alone.fingerprint, alone.skipped)
    for name in ("used", "tokens", "targets"):
        ours, theirs = getattr(together.sources[0], name), getattr(alone.sources[0], name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_a_process_that_dies_while_it_measures_is_told(encoder, tmp_path, monkeypatch):
    share(monkeypatch)
    monkeypatch.setattr(Encoder, "measure", lambda self, row, origin: os.kill(os.getpid(), 9))
    with pytest.raises(InputError, match="data-loader worker is gone") as caught:
        prepare([source(write_rows(tmp_path / "d.jsonl", GOOD))], encoder, on_bad_sample="stop")
    assert "run the same command again" in caught.value.hint
