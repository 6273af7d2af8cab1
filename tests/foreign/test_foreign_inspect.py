"""`inspect` over checkpoints of other tools: real ones, broken ones, and what is none."""

import json
import shutil
import struct
import subprocess
import sys
import time

import hostile
import pytest
from samples import SAMPLES, needs_samples

from onward.foreign.known import open_training
from onward.runs.inspect import inspect

KNOWN = {  # sample → kind, tool, step, can go on with its optimizer
    "qwen-7b-lora-ckpt/checkpoint-6": ("training checkpoint, PEFT adapter", "Hugging Face Trainer", "6 of 10", True),
    "qwen-vl-qlora-ckpt/checkpoint-6": ("training checkpoint, PEFT adapter", "Hugging Face Trainer", "6 of 10", True),
    "xtuner-llava-pth/iter_6.pth": ("training checkpoint, one file", "XTuner", "iteration 6", True),
    "xtuner-llava-pth/pretrain_iter_4.pth": ("training checkpoint, one file", "XTuner", "iteration 4", True),
    "xtuner-internvl-pth/iter_5.pth": ("training checkpoint, one file", "XTuner", "iteration 5", True),
    "xtuner-llava-iter-dir/iter_5.pth": ("training checkpoint, sharded", "XTuner with DeepSpeed", "5", True),
    "xtuner-llava-iter-dir-zero1/iter_5.pth": ("training checkpoint, sharded", "XTuner with DeepSpeed", "5", True),
    "xtuner-llava-iter-dir-zero2-2ranks/iter_5.pth": (
        "training checkpoint, sharded", "XTuner with DeepSpeed", "5", True,
    ),
    "xtuner-llava-pth/plain_state_dict.pth": (
        "weights of a LLaVA, what was trained of it", "XTuner (plain state dict)", "", False,
    ),
    "xtuner-llava-pth/pretrained_plain.pth": ("projector", "a state dict of torch", "", False),
}  # fmt: skip


@needs_samples
@pytest.mark.parametrize("sample", KNOWN)
def test_samples_are_recognised(sample):
    kind, tool, step, exactly = KNOWN[sample]
    found = inspect(SAMPLES / sample)
    assert (found.kind, found.tool, found.continues_exactly) == (kind, tool, exactly)
    assert str(found.facts.get("step", "")).startswith(step)
    assert not found.problems and found.next_command
    assert exactly or found.likely_cause


@needs_samples
def test_every_sample_is_something():
    for path in SAMPLES.iterdir():
        found = inspect(path)
        assert found.kind != "not recognised" and (found.missing or found.continues_exactly), path
        json.dumps(found.to_json())


@needs_samples
def test_what_a_sample_holds():
    found = inspect(SAMPLES / "xtuner-llava-pth/iter_6.pth")
    assert found.facts["base models"] == ["bases/xtuner-internlm2", "bases/xtuner-clip"]
    assert found.facts["adapters' scale"] == ["llm_lora: alpha 16, rank 8", "visual_encoder_lora: alpha 8, rank 4"]
    assert found.facts["holds"] == [
        "language_model: adapters on 11 layers, rank 8",
        "vision_tower: adapters on 18 layers, rank 4",
        "projector: 4 tensors in full",
    ]
    assert found.facts["optimizer"] == "state of 50 parameters"
    trainer = inspect(SAMPLES / "qwen-7b-lora-ckpt/checkpoint-6")
    assert trainer.facts["next learning rates"] == [0.0008263518223330697]


def copied(tmp_path, sample):
    target = tmp_path / sample.split("/")[-1]
    shutil.copytree(SAMPLES / sample, target)
    return target


@needs_samples
def test_what_is_missing_is_named_with_its_cause(tmp_path):
    trainer = copied(tmp_path, "qwen-7b-lora-ckpt/checkpoint-6")
    (trainer / "optimizer.pt").unlink()
    found = inspect(trainer)
    assert not found.continues_exactly and "the optimizer's state" in found.missing
    assert "save_only_model" in found.likely_cause and "from weights" in found.next_command
    (trainer / "adapter_model.bin").unlink()
    assert "weights" in inspect(trainer).missing

    sharded = copied(tmp_path, "xtuner-llava-iter-dir-zero2-2ranks/iter_5.pth")
    (sharded / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    found = inspect(sharded)
    assert not found.continues_exactly and found.next_command is None
    assert "1 of 2 ranks" in found.problems[0] and "other machines" in found.likely_cause


@needs_samples
def test_a_model_with_a_shard_missing(tmp_path):
    model = copied(tmp_path, "internvl2-tiny")
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model-00002-of-00002.safetensors").unlink()
    found = inspect(model)
    assert any("1 of 2 shards are missing" in problem for problem in found.problems)
    assert found.likely_cause == "the download or copy was cut short"


@needs_samples
def test_truncated_files_are_told_not_raised(tmp_path):
    for sample in ("xtuner-llava-pth/iter_6.pth", "qwen-7b-lora-ckpt/checkpoint-6/optimizer.pt"):
        data = (SAMPLES / sample).read_bytes()
        path = tmp_path / "cut.pth"
        path.write_bytes(data[: len(data) // 2])
        found = inspect(path)
        assert "truncated" in found.problems[0] and "cut short" in found.likely_cause
    trainer = copied(tmp_path, "qwen-7b-lora-ckpt/checkpoint-6")
    (trainer / "optimizer.pt").write_bytes(data[:-40])
    assert any("optimizer.pt" in problem for problem in inspect(trainer).problems)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n")
    assert "git lfs pull" in inspect(tmp_path / "pointer.bin").likely_cause
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    assert "web page" in inspect(tmp_path / "page.safetensors").likely_cause
    (tmp_path / "notes.txt").write_text("hello")
    assert inspect(tmp_path / "notes.txt").kind == "not recognised"
    (tmp_path / "empty").mkdir()
    assert inspect(tmp_path / "empty").kind == "not recognised"
    (tmp_path / "empty.pth").write_bytes(b"")
    assert inspect(tmp_path / "empty.pth").problems


def test_links_and_paths_out_of_a_directory_are_refused(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for number, name in enumerate(("../secret.safetensors", "/etc/passwd", "..", "link.safetensors")):
        model = tmp_path / f"model-{number}"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "llama"}')
        (model / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        assert any("file name in this" in p or "leads out" in p for p in inspect(model).problems), name
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/latest").write_text("../model-0")
    assert inspect(tmp_path / "zero").kind == "not recognised"


def sparse_zip(path, pickled, size):
    """A torch zip with one storage that is a hole of `size` bytes; written by hand, since zipfile would sum it up."""
    table = b""
    with path.open("wb") as file:
        for name, data, length in (("archive/data.pkl", pickled, len(pickled)), ("archive/data/0", b"", size)):
            begin, sizes = file.tell(), struct.pack("<HHQQ", 1, 16, length, length)
            common = struct.pack("<5HL", 45, 0, 0, 0, 0, 0) + struct.pack("<2L", 0xFFFFFFFF, 0xFFFFFFFF)
            file.write(b"PK\3\4" + common + struct.pack("<2H", len(name), len(sizes)) + name.encode() + sizes + data)
            file.seek(length - len(data), 1)
            file.truncate()
            extra = struct.pack("<HHQQQ", 1, 24, length, length, begin)
            rest = struct.pack("<5H2L", len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
            table += b"PK\1\2" + struct.pack("<H", 45) + common + rest + name.encode() + extra
        begin = file.tell()
        end = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(table), begin)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(table), 1)
        file.write(table + end + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(table), 0xFFFFFFFF, 0))


def test_fifty_gigabytes_of_holes_take_less_than_two_seconds(tmp_path):
    """Ten sparse shards of 5 GB each, as safetensors; read by a process of its own, which must not import torch."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    weight_map, size = {}, 5 << 30
    for number in range(10):
        shard = model / f"model-{number + 1:05}-of-00010.safetensors"
        count = 100
        each = size // count // 2 * 2
        header = {
            f"model.layers.{number}.{i}.weight": {
                "dtype": "BF16",
                "shape": [each // 2],
                "data_offsets": [i * each, (i + 1) * each],
            }
            for i in range(count)
        }
        weight_map |= dict.fromkeys(header, shard.name)
        text = json.dumps(header).encode()
        with shard.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + each * count)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code = (
        "import sys, time; from pathlib import Path; from onward.runs.inspect import inspect; b = time.process_time();"
        f"d = inspect(Path({str(model)!r})); assert not d.problems, d; print(d.facts['weights']);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(time.process_time() - b)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert told[0] == "1000 tensors (BF16 1000)" and float(told[1]) < 2


def test_a_pickled_file_of_fifty_gigabytes(tmp_path):
    path, count = tmp_path / "x.pth", 50 << 28
    sparse_zip(
        path,
        hostile.tensor((count,), (1,), count=count).replace(b"\x80\x02", b"\x80\x02}X\1\0\0\0w", 1)[:-1] + b"s.",
        count * 4,
    )
    start = time.process_time()
    found = inspect(path)
    assert found.facts["parameters"] == f"{count:,}" and not found.problems
    assert time.process_time() - start < 2


def test_what_torch_s_converter_leaves_starts_a_stage(tmp_path):
    """A file of DCP's, as dcp_to_torch makes it: weights under `model`, the optimizer's state beside them."""
    import torch

    weights = {"model.embed_tokens.weight": torch.zeros(4, 2), "lm_head.weight": torch.ones(4, 2)}
    torch.save({"model": weights, "optim": {"state": {}}}, tmp_path / "all of it.pt")
    found = inspect(tmp_path / "all of it.pt")
    assert found.facts["parameters"] == "16"
    command = f"onward import '{tmp_path}/all of it.pt' --plan PLAN --run RUN"
    assert found.next_command == f"{command}  # starts a new stage from weights"
    assert set(open_training(tmp_path / "all of it.pt").weights) == set(weights)
