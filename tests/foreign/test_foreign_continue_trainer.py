"""Trainer's checkpoints, continued by Trainer and by onward on the same batches: the same weights after ten steps."""

import shutil
from pathlib import Path

import pytest
import torch
import trainer_run
from trainer_run import SAVED, STEPS

import onward
from onward.checkpoint.tensorfile import read_tensors
from onward.errors import OnwardError, Refused
from onward.files import read_jsonl
from onward.runs.import_training import import_training
from onward.runs.inspect import inspect
from onward.runs.status import status
from onward.runs.verify import verify

BOUND = 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Kind → a place where Trainer has trained it to the end, made when it is first asked for."""
    made = {}

    def place(kind: str) -> Path:
        if kind not in made:
            directory = trainer_run.make_place(tmp_path_factory.mktemp("trained") / "x", *PLACES[kind])
            trainer_run.train(directory, PLACES[kind][0])
            made[kind] = directory
        return made[kind]

    return place


PLACES = {"full": ("full",), "lora": ("lora",), "part": ("part",)}


def bring(place, tmp_path, accept=("data_order",), source=None, overrides=()):
    source = source or place / f"trainer/checkpoint-{SAVED}"
    return import_training(
        source, place / "plan.yaml", tmp_path / "run", list(overrides), accept=accept, note=lambda _: None
    )


def pickled(checkpoint, directory, *, shards=False):
    """The same checkpoint as transformers 4 wrote it: weights in a pickle, or in several with an index."""
    import json

    shutil.copytree(checkpoint, directory)
    (file,) = directory.glob("*model.safetensors")
    tensors = read_tensors(file)
    file.unlink()
    stem = "adapter_model" if file.name.startswith("adapter") else "pytorch_model"
    if not shards:
        torch.save(tensors, directory / f"{stem}.bin")
        return directory
    names = sorted(tensors)
    parts = {f"{stem}-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for part, mine in parts.items():
        torch.save({name: tensors[name] for name in mine}, directory / part)
    index = {"weight_map": {name: part for part, mine in parts.items() for name in mine}}
    (directory / f"{stem}.bin.index.json").write_text(json.dumps(index))
    return directory


def finals(place, run, kind):
    """What Trainer has at its end beside what onward has, by name."""
    if kind == "lora":
        theirs = read_tensors(place / "trainer/final/adapter_model.safetensors")
        return theirs, read_tensors(run / "stages/1-only/output/adapter_model.safetensors")
    return (
        read_tensors(place / "trainer/final/model.safetensors"),
        read_tensors(run / "stages/1-only/output/model.safetensors"),
    )


WHOLE = pytest.mark.whole
FORMS = [
    ("full", ""),
    ("lora", "bin"),
    *(pytest.param(*one, marks=WHOLE) for one in (("lora", ""), ("full", "shards"), ("part", ""))),
]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_ten_steps_further_the_weights_are_trainer_s(trained, tmp_path, kind, form):
    place = trained(kind)
    source = place / f"trainer/checkpoint-{SAVED}"
    if form:
        source = pickled(source, tmp_path / source.name, shards=form == "shards")
    report = bring(place, tmp_path, source=source)
    assert (report.step, report.weights_only) == (SAVED, False)
    for step, theirs, ours in report.learning_rates:
        assert step > SAVED and ours == pytest.approx(theirs, rel=1e-9)
    result = onward.run(place / "plan.yaml", directory=tmp_path / "run")
    assert (result.steps_trained, result.tier) == (STEPS - SAVED, "declared")
    theirs, ours = finals(place, tmp_path / "run", kind)
    before = read_tensors(next((place / f"trainer/checkpoint-{SAVED}").glob("*model.safetensors")))
    assert set(theirs) == set(ours)
    moved = max(float((theirs[name] - before[name]).abs().max()) for name in theirs)
    assert moved > 1e-3
    for name in theirs:
        assert float((theirs[name] - ours[name]).abs().max()) < BOUND, name


def test_the_optimizer_s_moments_are_trainer_s_by_name(trained, tmp_path):
    """Against torch's own numbering, with the model that Trainer had."""
    import transformers

    place = trained("full")
    bring(place, tmp_path)
    checkpoint = onward.load(tmp_path / f"run/stages/1-only/checkpoints/step-{SAVED:06}")
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    theirs = torch.load(place / f"trainer/checkpoint-{SAVED}/optimizer.pt", weights_only=True)["state"]
    decays = [n for n, _ in model.named_parameters() if "norm" not in n]
    spared = [n for n, _ in model.named_parameters() if "norm" in n]
    for number, name in enumerate([*decays, *spared]):
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(checkpoint.optimizer()[name, slot], theirs[number][slot]), name


def test_killed_after_an_import_nothing_changes(trained, tmp_path):
    """The imported run, left alone and interrupted: the same bits, as for any run."""
    from onward.runs.diff import diff

    place = trained("lora")
    bring(place, tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    onward.run(place / "plan.yaml", directory=tmp_path / "run")
    trainer_run.interrupted(place, tmp_path / "other")
    again = onward.run(place / "plan.yaml", directory=tmp_path / "other")
    assert again.tier == "bitwise" and again.steps_trained < STEPS - SAVED
    assert diff(tmp_path / "run", tmp_path / "other").equal


def test_the_run_tells_where_it_comes_from(trained, tmp_path):
    place = trained("lora")
    bring(place, tmp_path)
    run = tmp_path / "run"
    assert verify(run).ok
    assert inspect(run).continues_exactly
    assert status(run).stages[0].checkpoints == (SAVED,)
    first = read_jsonl(run / "journal.jsonl")[0]
    assert (first["event"], first["tool"], first["step"]) == ("imported", "Hugging Face Trainer", SAVED)
    assert first["files"]["optimizer.pt"].startswith("xxh3:")
    onward.run(place / "plan.yaml", directory=run)
    assert verify(run).ok and status(run).state == "finished"


def test_what_goes_on_otherwise_must_be_accepted(trained, tmp_path):
    place = trained("lora")
    said = ["stages.only.learning_rate=1e-3", "stages.only.batch_size=8", "stages.only.optimizer.weight_decay=0.2"]
    with pytest.raises(Refused) as caught:
        bring(place, tmp_path, overrides=said, accept=())
    for key in ("learning_rate", "batch_size", "optimizer.weight_decay", "data_order"):
        assert f"{key}: " in str(caught.value) and f"--accept {key}" in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(Refused, match="schedule"):
        bring(place, tmp_path, overrides=["stages.only.schedule.name=linear"])
    with pytest.raises(OnwardError, match="nothing of that name"):
        bring(place, tmp_path, accept=("data_order", "sead"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("stages.only.train.language_model.rank=8", "the plan needs"),
        ("stages.only.train.language_model.alpha=8", "counts 1.5 times in the source"),
        ("stages.only.train.language_model.targets=[q_proj]", "has adapters that the plan does not train"),
        ("stages.only.train.language_model.targets=[q_proj,v_proj,down_proj,k_proj]", "does not hold"),
        ("stages.only.train.language_model.shared_a=[q_proj,v_proj]", "the source has one for each"),
        ("stages.only.steps=6", "ends at step 6"),
    ],
)
def test_another_training_is_refused(trained, tmp_path, said, reason):
    with pytest.raises(Refused, match=reason):
        bring(trained("lora"), tmp_path, overrides=[said])


def test_another_model_under_a_part_is_refused(trained, tmp_path):
    place = tmp_path / "x"
    shutil.copytree(trained("part"), place)
    tensors = read_tensors(place / "model/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    from onward.checkpoint.tensorfile import write_tensors

    (place / "model/model.safetensors").unlink()
    write_tensors(place / "model/model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(Refused, match=r"layers\.0\.mlp\.up_proj"):
        bring(place, tmp_path)


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=WHOLE)])
def test_without_an_optimizer_a_stage_starts_from_weights(trained, tmp_path, kind):
    place, source = trained(kind), tmp_path / "checkpoint-6"
    shutil.copytree(place / f"trainer/checkpoint-{SAVED}", source)
    (source / "optimizer.pt").unlink()
    report = bring(place, tmp_path, source=source, accept=())
    assert report.weights_only and any("*from weights*" in line for line in report.lines())
    overrides = ["stages.only.output=merged"]
    report = import_training(source, place / "plan.yaml", tmp_path / "two", overrides, accept=(), note=lambda _: None)
    result = onward.run(place / "plan.yaml", overrides, directory=tmp_path / "two", until="only")
    assert result.steps_trained == STEPS
    start = read_tensors(tmp_path / "two/stages/1-only/start/model.safetensors")
    if kind == "full":
        theirs = read_tensors(place / f"trainer/checkpoint-{SAVED}/model.safetensors")
        assert all(torch.equal(start[name], theirs[name]) for name in theirs)
    else:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(base, place / f"trainer/checkpoint-{SAVED}").merge_and_unload()
        for name, parameter in merged.named_parameters():
            assert torch.allclose(start[name], parameter, atol=1e-7), name
