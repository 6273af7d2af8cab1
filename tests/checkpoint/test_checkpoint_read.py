import shutil
from dataclasses import replace

import checkpoint_snapshots as snaps
import pytest
import torch
from checkpoint_sliced import manifest, write_sliced

from onward.checkpoint.manifest import write_file, write_manifest
from onward.checkpoint.read import list_checkpoints, newest_verified, open_checkpoint
from onward.checkpoint.tensorfile import read_header, tensor_of, write_tensors
from onward.checkpoint.verify import verify_directory
from onward.errors import DamageError, InputError, Refused


def test_the_newest_is_found_by_its_manifest_not_by_its_name(tmp_path):
    for step in (100, 200, 300):
        snaps.save(tmp_path, step)
    snaps.place(tmp_path, 300).rename(tmp_path / "a-moved-one")
    snaps.place(tmp_path, 100).rename(snaps.place(tmp_path, 999))
    found, passed = newest_verified(tmp_path, snaps.RUN)
    assert found.manifest.step == 300 and found.directory.name == "a-moved-one" and passed == []
    assert [item.step for _, item in list_checkpoints(tmp_path)] == [100, 200, 300]


def test_junk_partials_and_other_runs_are_passed_over(tmp_path):
    snaps.save(tmp_path, 100)
    shutil.copytree(snaps.place(tmp_path, 100), tmp_path / ".partial-step-000900-abc")
    snaps.save(tmp_path, 200, run_id="run-two")
    snaps.save(tmp_path, 300, stage="sft")
    (tmp_path / "junk").mkdir()
    (tmp_path / "step-000950").mkdir()
    (tmp_path / "step-000960").write_text("a file")
    found, passed = newest_verified(tmp_path, snaps.RUN, stage="align")
    assert found.manifest.step == 100
    assert {damage.path.name: damage.reason.split(" (")[0] for damage in passed} == {
        "step-000950": "has no manifest.json",
        "step-000200": "belongs to another run",
        "step-000300": "belongs to another stage",
    }


def test_nothing_there_is_nothing_found(tmp_path):
    assert newest_verified(tmp_path / "missing", snaps.RUN) == (None, [])
    assert list_checkpoints(tmp_path / "missing") == []


def test_identity_is_checked(tmp_path):
    directory = snaps.save(tmp_path, 100)
    with pytest.raises(Refused, match="another run"):
        open_checkpoint(directory, run_id="run-two")
    with pytest.raises(Refused, match="another stage"):
        open_checkpoint(directory, stage="sft")


def test_an_output_verifies_and_is_no_checkpoint(tmp_path):
    (tmp_path / "sub").mkdir()
    files = (
        write_file(tmp_path / "config.json", b"{}"),
        write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(3)}),
        replace(write_file(tmp_path / "sub" / "chat.jinja", b"x"), path="sub/chat.jinja"),
    )
    write_manifest(tmp_path, manifest(kind="output", files=files))
    assert verify_directory(tmp_path) == []
    with pytest.raises(InputError, match="output"):
        open_checkpoint(tmp_path)
    (tmp_path / "sub" / "chat.jinja").write_text("y")
    assert [problem.path for problem in verify_directory(tmp_path)] == [tmp_path / "sub" / "chat.jinja"]


def test_a_tensor_in_slices_of_several_files_is_put_together(tmp_path):
    whole = write_sliced(tmp_path / "c", [((0, 0), (2, 6)), ((2, 0), (2, 4)), ((2, 4), (2, 2))])
    assert torch.equal(open_checkpoint(tmp_path / "c").weights()["w"], whole)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 6)), ((1, 0), (2, 6))],  # overlap, and a gap of the same size
        [((0, 0), (2, 6))],  # a gap
        [((0, 0), (4, 6)), ((0, 0), (4, 6))],  # twice
    ],
)
def test_slices_that_do_not_tile_are_damage(tmp_path, boxes):
    write_sliced(tmp_path / "c", boxes)
    with pytest.raises(DamageError, match="slices"):
        open_checkpoint(tmp_path / "c")


def test_slices_outside_the_tensor_are_damage(tmp_path):
    directory = snaps.save(tmp_path, 100)
    written = open_checkpoint(directory).manifest
    first = written.tensors[0]
    moved = replace(first, slices=(replace(first.slices[0], offset=(1, 0)),))
    (directory / "manifest.json").unlink()
    write_manifest(directory, replace(written, tensors=(moved, *written.tensors[1:])))
    with pytest.raises(DamageError, match="slices"):
        open_checkpoint(directory)


def test_what_is_continued_is_read_once(tmp_path, monkeypatch):
    snaps.save(tmp_path, 100)
    monkeypatch.setattr("onward.checkpoint.read.read_tensor", lambda path, entry: pytest.fail(f"{path} read again"))
    kept, _ = newest_verified(tmp_path, snaps.RUN)
    tensors = {**kept.weights(), **kept.optimizer(), **kept.adapter().tensors}
    monkeypatch.undo()
    kept.release()
    again = {**kept.weights(), **kept.optimizer(), **kept.adapter().tensors}
    assert tensors.keys() == again.keys() and len({tensor.dtype for tensor in tensors.values()}) > 1
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name]) and tensor.dtype == again[name].dtype, name


def test_without_room_in_memory_nothing_is_kept(tmp_path, monkeypatch):
    snaps.save(tmp_path, 100)
    monkeypatch.setattr("onward.checkpoint.memory.available_memory", lambda: 1 << 20)
    checkpoint, _ = newest_verified(tmp_path, snaps.RUN)
    assert not checkpoint.kept
    assert dict(checkpoint.weights())


def test_a_tensor_in_memory_that_is_not_aligned_is_moved(tmp_path):
    import mmap

    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(5, dtype=torch.float32), "c": torch.ones(0)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    content = mmap.mmap(-1, len(data))
    content[:] = data
    for name, entry in read_header(tmp_path / "x.safetensors")[0].items():
        assert torch.equal(tensor_of(content, entry), tensors[name])
