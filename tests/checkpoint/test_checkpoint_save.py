import json
import os
import shutil
from dataclasses import replace

import checkpoint_snapshots as snaps
import pytest
import torch
from safetensors.torch import load_file

from onward.checkpoint import save as save_module
from onward.checkpoint.background import Background
from onward.checkpoint.read import newest_verified, open_checkpoint
from onward.checkpoint.save import Adapter, save_checkpoint, snapshot_bytes
from onward.checkpoint.verify import verify_directory
from onward.errors import InputError, Refused


def test_everything_comes_back_bit_for_bit(tmp_path):
    written = snaps.snapshot(7)
    manifest = save_checkpoint(written, tmp_path / "stage" / "step-000007")
    checkpoint = open_checkpoint(tmp_path / "stage" / "step-000007", run_id=snaps.RUN, stage="align")
    assert checkpoint.manifest == manifest
    assert (manifest.step, manifest.samples_seen, manifest.optimizer) == (7, 112, "adamw")
    assert checkpoint.progress == written.progress
    adapter = checkpoint.adapter()
    assert adapter.config == written.adapter.config
    for read, wrote in (
        (checkpoint.weights(), written.weights),
        (adapter.tensors, written.adapter.tensors),
        (checkpoint.optimizer(), written.optimizer),
    ):
        assert set(read) == set(wrote)
        assert all(snaps.equal_bits(read[name], wrote[name]) for name in wrote)
    assert verify_directory(checkpoint.directory) == []


def test_other_readers_read_the_tensors(tmp_path):
    written = snaps.snapshot()
    save_checkpoint(written, tmp_path / "step-000100")
    read = load_file(tmp_path / "step-000100" / "weights-00000.safetensors")
    assert read.keys() == written.weights.keys()
    assert all(snaps.equal_bits(read[name], written.weights[name]) for name in read)


def test_peft_loads_the_directory_as_it_is(tmp_path):
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tensors = peft.get_peft_model_state_dict(trained)
    trained.save_pretrained(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    save_checkpoint(snaps.snapshot(adapter=Adapter(config, tensors), weights={}), tmp_path / "step-000100")
    loaded = peft.PeftModel.from_pretrained(trained.unload(), tmp_path / "step-000100")
    read = peft.get_peft_model_state_dict(loaded)
    assert read.keys() == tensors.keys() and tensors
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_parts_that_a_stage_has_not_are_not_there(tmp_path):
    directory = tmp_path / "step-000001"
    save_checkpoint(snaps.snapshot(1, adapter=None, optimizer={}), directory)
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json",
        "progress.json",
        "weights-00000.safetensors",
    }
    checkpoint = open_checkpoint(directory)
    assert checkpoint.adapter() is None and len(checkpoint.optimizer()) == 0


def test_equal_states_give_equal_files(tmp_path):
    one, other = snaps.save(tmp_path / "a", 5), snaps.save(tmp_path / "b", 5)
    files = snaps.content(one)
    assert {name: data for name, data in snaps.content(other).items() if name != "manifest.json"} == {
        name: data for name, data in files.items() if name != "manifest.json"
    }


def test_snapshot_bytes_is_an_upper_bound_and_no_wild_one(tmp_path):
    snapshot = snaps.snapshot(weights={f"weight.{n}": torch.zeros(200, 300) for n in range(4)})
    save_checkpoint(snapshot, tmp_path / "step-000100")
    taken = sum(path.stat().st_size for path in (tmp_path / "step-000100").iterdir())
    assert taken <= snapshot_bytes(snapshot) < 1.3 * taken


def test_too_little_space_changes_nothing(tmp_path, monkeypatch):
    free = snapshot_bytes(snaps.snapshot()) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.raises(InputError, match="step 100"):
        snaps.save(tmp_path, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        save_checkpoint(snaps.snapshot(progress={"loss": float("nan")}), tmp_path / "step-000100")
    assert list(tmp_path.iterdir()) == []


def test_saving_the_same_step_again_keeps_what_is_there(tmp_path):
    directory = snaps.save(tmp_path, 100)
    before, inode = snaps.content(directory), directory.stat().st_ino
    snaps.save(tmp_path, 100)
    assert snaps.content(directory) == before and directory.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [directory]


def test_another_state_at_the_same_step_takes_its_place(tmp_path):
    snaps.save(tmp_path, 100)
    directory = snaps.save(tmp_path, 100, seed=1)
    expected = snaps.snapshot(100, seed=1).weights["projector.weight"]
    assert torch.equal(open_checkpoint(directory).weights()["projector.weight"], expected)
    assert list(tmp_path.iterdir()) == [directory]


def test_a_damaged_one_of_this_run_is_replaced(tmp_path):
    directory = snaps.save(tmp_path, 100)
    (directory / "progress.json").unlink()
    snaps.save(tmp_path, 100)
    assert verify_directory(directory) == []
    assert list(tmp_path.iterdir()) == [directory]


def test_what_the_run_may_not_have_written_is_set_aside_not_deleted(tmp_path):
    directory = snaps.place(tmp_path, 100)
    directory.mkdir()
    (directory / "thesis.txt").write_text("all my work")
    snaps.save(tmp_path, 100)
    assert verify_directory(directory) == []
    kept = list(tmp_path.rglob("thesis.txt"))
    assert [path.read_text() for path in kept] == ["all my work"]
    assert kept[0].parent.name.startswith(".damaged-step-000100-")


def test_another_runs_checkpoint_is_never_replaced(tmp_path):
    directory = snaps.save(tmp_path, 100, run_id="run-two")
    before = snaps.content(directory)
    with pytest.raises(Refused, match="run-two"):
        snaps.save(tmp_path, 100)
    assert snaps.content(directory) == before and list(tmp_path.iterdir()) == [directory]


class _Crash(BaseException):
    """The process ends here: nothing that would clean up runs."""


@pytest.mark.parametrize("old_is_damaged", [False, True])
def test_a_crash_at_any_rename_of_a_replacement_loses_no_verified_checkpoint(tmp_path, monkeypatch, old_is_damaged):
    """Stop before each rename and each deletion that follows the new checkpoint's commit, in turn."""
    new = snaps.snapshot(100, seed=1).weights["projector.weight"]
    committed = save_module._commit
    crashes = 0
    for crash_at in range(50):
        checkpoints = tmp_path / str(crash_at)
        directory = snaps.save(checkpoints, 100)
        if old_is_damaged:
            (directory / "progress.json").write_text("")
        calls = 0

        def step(original, *, crash_at=crash_at):
            def wrapped(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == crash_at + 1:
                    raise _Crash
                return original(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patch:

            def commit_then_count(snapshot, target, patch=patch, step=step):
                manifest = committed(snapshot, target)
                for owner, name in ((os, "rename"), (os, "unlink"), (os, "rmdir")):
                    patch.setattr(owner, name, step(getattr(owner, name)))
                return manifest

            patch.setattr(save_module, "_commit", commit_then_count)
            try:
                snaps.save(checkpoints, 100, seed=1)
            except _Crash:
                crashes += 1
            else:
                break
        found, _ = newest_verified(checkpoints, snaps.RUN)
        assert found is not None, f"nothing verified after a crash at call {crash_at}"
        assert torch.equal(found.weights()["projector.weight"], new)
    assert crashes >= 5


def test_behind_the_training_the_same_is_written(tmp_path):
    whole = snaps.snapshot()
    whole = replace(whole, adapter=replace(whole.adapter, quantisation={"layers": {"a": {"bits": 8}}}))
    save_checkpoint(whole, snaps.place(tmp_path, 100))
    behind = Background()
    behind.start(whole, lambda copy: save_checkpoint(copy, tmp_path / "behind/step-000100"))
    behind.wait()
    assert behind.failure() is None
    ours, theirs = snaps.content(tmp_path / "behind/step-000100"), snaps.content(snaps.place(tmp_path, 100))
    assert "quantisation.json" in ours
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {"manifest.json"}
