"""Every file deleted, truncated, altered by one byte, zeroed, emptied: found and named, and the one before is used."""

import shutil
from dataclasses import replace

import checkpoint_snapshots as snaps
import pytest

from onward.checkpoint.manifest import MANIFEST, Slice, read_manifest, render
from onward.checkpoint.read import newest_verified, open_checkpoint
from onward.checkpoint.verify import verify_directory
from onward.errors import DamageError, InputError, OnwardError

FILES = [
    "adapter_config.json", "adapter_model.safetensors", "weights-00000.safetensors", "optimizer-00000.safetensors",
    "progress.json", MANIFEST,
]  # fmt: skip


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(data)


FAULTS = {
    "deleted": lambda path: path.unlink(),
    "truncated by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first byte flipped": lambda path: _flip(path, 0),
    "middle byte flipped": lambda path: _flip(path, path.stat().st_size // 2),
    "last byte flipped": lambda path: _flip(path, -1),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "emptied": lambda path: path.write_bytes(b""),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    snaps.save(checkpoints, 100)
    snaps.save(checkpoints, 200)
    assert {path.name for path in snaps.place(checkpoints, 200).iterdir()} == set(FILES)
    return checkpoints


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_and_the_one_before_is_used(saved, tmp_path, file, fault):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(saved, checkpoints)
    damaged = snaps.place(checkpoints, 200) / file
    FAULTS[fault](damaged)
    with pytest.raises(DamageError) as error:
        open_checkpoint(damaged.parent)
    assert str(damaged) in str(error.value)
    assert damaged in [problem.path for problem in verify_directory(damaged.parent)]
    found, passed = newest_verified(checkpoints, snaps.RUN)
    assert found is not None and found.manifest.step == 100
    assert [damage.path for damage in passed] == (
        [damaged.parent] if not damaged.exists() and file == MANIFEST else [damaged]
    )


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_any_flipped_byte_of_the_manifest_is_found(saved, tmp_path, mask):
    path = tmp_path / MANIFEST
    data = (snaps.place(saved, 200) / MANIFEST).read_bytes()
    for position in range(0, len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
        with pytest.raises(OnwardError):
            read_manifest(tmp_path)
    path.write_bytes(data)
    assert read_manifest(tmp_path).step == 200


def test_all_damage_is_listed_not_only_the_first(saved, tmp_path):
    directory = tmp_path / "step"
    shutil.copytree(snaps.place(saved, 200), directory)
    (directory / "progress.json").unlink()
    _flip(directory / "weights-00000.safetensors", 50)
    (directory / "notes.txt").write_text("x")
    problems = {problem.path.name: problem.reason for problem in verify_directory(directory)}
    assert problems.keys() == {"progress.json", "weights-00000.safetensors", "notes.txt"}
    assert problems["progress.json"] == "missing" and "digest" in problems["weights-00000.safetensors"]


def _forge(directory, change):
    """A manifest whose own digest is right, but which does not say what the files hold."""
    (directory / MANIFEST).write_bytes(render(change(read_manifest(directory))))


def _tensor(manifest, name, **changes):
    tensors = tuple(replace(t, **changes) if (t.name, t.slot) == name else t for t in manifest.tensors)
    return replace(manifest, tensors=tensors)


BIAS = ("projector.bias", "weight")
BIAS_FILE = "weights-00000.safetensors"
FORGERIES = {
    "a tensor left out": (
        lambda m: replace(m, tensors=tuple(t for t in m.tensors if (t.name, t.slot) != BIAS)),
        "projector.bias is not in the manifest",
    ),
    "a tensor too many": (
        lambda m: replace(
            m, tensors=(*m.tensors, replace(m.tensors[-1], name="ghost", slices=(Slice(BIAS_FILE, "ghost", (), ()),)))
        ),
        "ghost",
    ),
    "another dtype": (lambda m: _tensor(m, BIAS, dtype="F16"), "projector.bias"),
    "another shape": (lambda m: _tensor(m, BIAS, shape=(4,)), "projector.bias"),
    "a tensor twice": (lambda m: replace(m, tensors=(*m.tensors, m.tensors[0])), "twice"),
    "no slices": (lambda m: _tensor(m, BIAS, slices=()), "projector.bias"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_tensors_must_be_exactly_those_of_the_manifest(saved, tmp_path, forgery):
    directory = tmp_path / "step"
    shutil.copytree(snaps.place(saved, 200), directory)
    change, named = FORGERIES[forgery]
    _forge(directory, change)
    with pytest.raises(DamageError, match=named):
        open_checkpoint(directory)
    assert verify_directory(directory)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "a/../../b", MANIFEST, "..", ""])
def test_a_manifest_cannot_lead_out_of_its_directory(saved, tmp_path, path):
    directory = tmp_path / "step"
    shutil.copytree(snaps.place(saved, 200), directory)
    _forge(directory, lambda m: replace(m, files=(*m.files[1:], replace(m.files[0], path=path))))
    with pytest.raises(DamageError, match="must not"):
        open_checkpoint(directory)


def test_a_newer_format_is_refused_as_such(saved, tmp_path):
    directory = tmp_path / "step"
    shutil.copytree(snaps.place(saved, 200), directory)
    _forge(directory, lambda m: replace(m, schema_version=2))
    with pytest.raises(InputError, match="format 2"):
        open_checkpoint(directory)
    assert len(verify_directory(directory)) == 1


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"schema_version": null}', b"\xff", b"[" * 100_000, b"null"])
def test_any_json_instead_of_a_manifest_is_damage(tmp_path, data):
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(DamageError):
        read_manifest(tmp_path)
