"""The reader that stands beside the format's description, against checkpoints that onward wrote."""

import hashlib
import subprocess
import sys
from pathlib import Path

import checkpoint_snapshots as snaps
import pytest
from checkpoint_sliced import write_sliced

from onward.checkpoint.tensorfile import tensor_bytes

SCRIPT = Path(__file__).parents[2] / "docs" / "read_checkpoint.py"


def read(directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-S", "-c", RUN, str(SCRIPT), str(directory)], capture_output=True, text=True
    )


# -S: without site-packages onward, torch and safetensors are out of reach; numpy's folder alone is put back
RUN = f"""
import sys, types
sys.path.append({str(Path(sys.modules["torch"].__file__).parents[1])!r})
for name in ("onward", "torch", "safetensors"):
    sys.modules[name] = None
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def expected_lines(snapshot):
    tensors = {("adapter", name): value for name, value in snapshot.adapter.tensors.items()}
    tensors |= {("weight", name): value for name, value in snapshot.weights.items()}
    tensors |= {(slot, name): value for (name, slot), value in snapshot.optimizer.items()}
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16"}
    digests = {place: hashlib.sha256(tensor_bytes(value)).hexdigest() for place, value in tensors.items()}
    return {
        f"{slot} {name} {names[str(value.dtype)]} {list(value.shape)} sha256:{digests[slot, name]}"
        for (slot, name), value in tensors.items()
    }


def test_it_prints_every_tensor_with_its_bits(tmp_path):
    directory = snaps.save(tmp_path, 100)
    result = read(directory)
    assert result.returncode == 0, result.stderr
    first, *rest = result.stdout.splitlines()
    assert first == "checkpoint of run run-one, stage align, step 100"
    assert set(rest) == expected_lines(snaps.snapshot(100)) and len(rest) == len(set(rest))


def test_it_puts_slices_together(tmp_path):
    whole = write_sliced(tmp_path / "c", [((0, 0), (2, 6)), ((2, 0), (2, 4)), ((2, 4), (2, 2))])
    assert hashlib.sha256(tensor_bytes(whole)).hexdigest() in read(tmp_path / "c").stdout


@pytest.mark.parametrize("file", ["manifest.json", "weights-00000.safetensors", "progress.json"])
def test_it_names_damage(tmp_path, file):
    path = snaps.save(tmp_path, 100) / file
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    result = read(path.parent)
    assert result.returncode == 1 and file in result.stderr and not result.stdout


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 60
