"""`inspect` and the unpickler over files that nobody wrote: no traceback, no hang, whatever the bytes.

ONWARD_FUZZ_SECONDS says how long the whole test takes (600); a sample of 5 s runs always.
"""

import json
import os
import shutil
import time

import hostile
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from samples import SAMPLES

from onward.errors import OnwardError
from onward.foreign.known import open_training
from onward.foreign.pickles import open_pickle
from onward.runs.inspect import inspect

SECONDS = float(os.environ.get("ONWARD_FUZZ_SECONDS", "600"))
SLOWEST = 20  # seconds for one file; most take a millisecond

SMALL = [
    path.read_bytes()
    for path in sorted(SAMPLES.rglob("*"))
    if path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".safetensors") and path.stat().st_size < 60_000
]
BASES = [
    *hostile.calls("marker").values(),
    *hostile.containers().values(),
    hostile.torch_zip(hostile.tensor((2, 2), (2, 1)), {"0": bytes(16)}),
    b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}        ',
    *SMALL,
]
BASES = [base for base in BASES if len(base) < 60_000]
OPCODES = [bytes([code]) for code in b"(.012FGIJKLMNPQRSTUVXabcdeghijlpqrstu}]" + bytes(range(0x80, 0x99))]
ARGUMENTS = [
    b"", b"\x00", b"\x01", b"\x02\x00\x00\x00ab", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n", b"X\x03\x00\x00\x00abc", b"K\x07", b")", b"}", b"(K\x01t",
    b"X\x0a\x00\x00\x00state_dict", b"X\x04\x00\x00\x00meta", b"X\x09\x00\x00\x00optimizer", b"1\n",
    b"\xff\xff\xff\xff",
]  # fmt: skip
PIECES = st.lists(st.sampled_from(OPCODES) | st.sampled_from(ARGUMENTS), max_size=40)
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(("flip", "cut", "insert", "repeat")), st.binary(max_size=8)), max_size=6
)
NAMES = st.sampled_from(
    ("global_step", "max_steps", "weight_map", "model_type", "peft_type", "lora_alpha", "base_model_name_or_path",
     "architectures", "_name_or_path", "a", "__metadata__", "data_offsets", "dtype", "shape", "metadata")
)  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(("../x", "F32", "/")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
FILES = (
    "trainer_state.json", "adapter_config.json", "config.json", "model.safetensors.index.json",
    "adapter_model.bin.index.json", "plan.lock.json", "manifest.json", "latest", "tokenizer_config.json",
)  # fmt: skip
BLOBS = (
    "model.safetensors", "adapter_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", ".metadata",
    "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "x.pth", "pytorch_model.bin",
)  # fmt: skip


def edited(base, edits):
    data = bytearray(base)
    for place, kind, content in edits:
        at = int(place * len(data))
        match kind:
            case "flip":
                data[at : at + len(content)] = content
            case "cut":
                del data[at : at + 1 + len(content) * 7]
            case "insert":
                data[at:at] = content
            case "repeat":
                data[at:at] = data[at : at + 50]
    return bytes(data)


BLOB = st.builds(edited, st.sampled_from(BASES), EDITS) | PIECES.map(lambda p: b"\x80\x02" + b"".join(p) + b".")
BLOB = BLOB | BLOB.map(lambda data: hostile.torch_zip(data, {"0": bytes(16)}))


def survives(look, path):
    start = time.process_time()
    try:
        look(path)
    except OnwardError as error:
        assert str(error)
    assert time.process_time() - start < SLOWEST, path


def fuzz(seconds, directory):
    """Rounds of examples, each with another seed, until the time is over."""
    directory.mkdir(exist_ok=True)
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        rules = settings(
            max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
        )

        @rules
        @seed(number)
        @given(BLOB, st.sampled_from((".pth", ".bin", ".safetensors", "")))
        def files(blob, suffix):
            path = directory / f"x{suffix}"
            path.write_bytes(blob)
            survives(open_pickle, path)
            survives(inspect, path)
            survives(open_training, path)

        @rules
        @seed(number)
        @given(
            st.dictionaries(st.sampled_from(FILES), JSON, max_size=4),
            st.dictionaries(st.sampled_from(BLOBS), BLOB, max_size=3),
        )
        def directories(texts, blobs):
            shutil.rmtree(directory)
            directory.mkdir()
            for name, value in texts.items():
                (directory / name).write_text(json.dumps(value))
            for name, blob in blobs.items():
                (directory / name).write_bytes(blob)
            survives(inspect, directory)
            survives(open_training, directory)

        files()
        directories()
    return number


def test_a_sample_of_what_nobody_wrote(tmp_path):
    assert fuzz(5, tmp_path / "x")


@pytest.mark.whole
def test_ten_minutes_of_what_nobody_wrote(tmp_path):
    assert fuzz(SECONDS, tmp_path / "x")
