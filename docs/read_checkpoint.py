"""Read a checkpoint without onward: verify every digest, then print what is in it. Needs numpy and xxhash.

python read_checkpoint.py runs/plan/stages/1-sft/checkpoints/step-000100
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import xxhash

NUMPY = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4"}
NUMPY |= {"F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8"}
NUMPY |= {"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}  # numpy has no such type: these are the bits


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:" + (xxhash.xxh3_128 if algorithm == "xxh3" else hashlib.sha256)(data).hexdigest()


def read_manifest(directory: Path) -> dict:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    promised = manifest.pop("digest")
    rest = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if digest(rest) != promised:
        sys.exit("manifest.json is damaged")
    for file in manifest["files"]:
        path = directory / file["path"]
        if not path.is_file() or digest(path.read_bytes(), file["digest"].partition(":")[0]) != file["digest"]:
            sys.exit(f"{file['path']} is missing or damaged")
    return manifest


def read_slice(path: Path, key: str) -> np.ndarray:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[key]
    begin, end = entry["data_offsets"]
    return np.frombuffer(data[start + begin : start + end], NUMPY[entry["dtype"]]).reshape(entry["shape"])


def read_tensor(directory: Path, tensor: dict) -> np.ndarray:
    whole = np.empty(tensor["shape"], NUMPY[tensor["dtype"]])
    for part in tensor["slices"]:
        place = tuple(slice(at, at + size) for at, size in zip(part["offset"], part["shape"], strict=True))
        whole[place] = read_slice(directory / part["file"], part["key"])
    return whole


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    manifest = read_manifest(directory)
    print(f"{manifest['kind']} of run {manifest['run_id']}, stage {manifest['stage']}, step {manifest['step']}")
    for tensor in manifest["tensors"]:
        values = read_tensor(directory, tensor)
        print(tensor["slot"], tensor["name"], tensor["dtype"], list(values.shape), digest(values.tobytes()))
