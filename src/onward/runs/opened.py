"""A model to use, by any name that a user has for it: a directory, an output, an adapter, a checkpoint of a run."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.checkpoint.save import ADAPTER_CONFIG, ADAPTER_TENSORS
from onward.checkpoint.tensorfile import read_header
from onward.errors import DamageError, PlanError, memory_ended
from onward.files import read_json, read_jsonl
from onward.model.directory import open_model_directory
from onward.plan.load import plan_from
from onward.plan.lock import locked_plan, plan_values
from onward.plan.schema import Images
from onward.runs.begin import open_lock, plan_file
from onward.runs.directory import RunDirectory
from onward.runs.micro_batch import with_room
from onward.runs.outputs import Start, beside_base, quantised_under, start_of, verified_output
from onward.runs.reference import Reference, find_checkpoint, parse_reference
from onward.runs.resolve import chat_template_of, model_directory
from onward.weights.shards import PARTS
from onward.weights.split import join

if TYPE_CHECKING:
    from onward.data.encode import Encoder

LONGEST = 1 << 20  # tokens: nothing is cut
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Named:
    """What a name stands for, nothing of it loaded: the model `base`, and an `adapter` or a `checkpoint` beside it.

    `base` holds the tokenizer and, unless `chat_template` is the text of another, the template too. `images`: the
    limits with which a checkpoint trained.
    """

    base: Path
    adapter: Path | None = None
    start: Start | None = None
    checkpoint: Reference | None = None
    images: Images | None = None
    chat_template: str | None = None


def find_model(name: str, base: str | None = None) -> Named:
    """What `name` stands for. `base`: for an adapter, instead of the base that it names.

    PlanError when there is nothing of that name; DamageError for an output whose bytes are not what was written.
    """
    path = Path(name)
    if not path.exists():
        if "@" not in name:
            raise PlanError("no such model directory", where=name, hint="RUN@STAGE/STEP names a checkpoint of a run")
        return _of_run(parse_reference(name))
    if RunDirectory(path).lock.is_file():
        raise PlanError("is a run, which has a model for each stage", where=name, hint=_choices(path))
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest.kind == "checkpoint":
            return _of_run(Reference(path.absolute().parents[3], manifest.stage, manifest.step))
        verified_output(path)
    if not (path / ADAPTER_CONFIG).is_file():
        if not (path / PARTS).is_file():
            open_model_directory(path)
        return Named(path)
    named = base or read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    for found in (Path(named), path / named) if named else ():  # a run names its own outputs relatively
        if (found / "config.json").is_file():
            own = path / TEMPLATE
            return Named(found, adapter=path, chat_template=own.read_text() if own.is_file() else None)
    reason = f"names {named} as its base, which is no directory here" if named else "names no base"
    raise PlanError(reason, where=name, hint="give it with --base DIR")


def _choices(path: Path) -> str:
    names = [stage.name for stage in locked_plan(open_lock(RunDirectory(path))).stages]
    there = [RunDirectory(path).output(names, name) for name in names]
    return f"name {next((str(o) for o in reversed(there) if o.exists()), f'a checkpoint: {path}@{names[0]}/last')}"


def _of_run(reference: Reference) -> Named:
    run = RunDirectory(reference.run)
    find_checkpoint(reference)
    lock = open_lock(run)
    loaded = plan_from(plan_values(locked_plan(lock)), {}, plan_file(run, read_jsonl(run.journal)))
    names = [stage.name for stage in loaded.plan.stages]
    start = start_of(run, lock, names, names.index(reference.stage), model_directory(loaded))
    images, template = loaded.plan.stages[names.index(reference.stage)].images, chat_template_of(loaded)
    return Named(start.base, start=start, checkpoint=reference, images=images, chat_template=template)


def encoder_of(named: Named) -> Encoder:
    """The model's encoder, which cuts nothing; a template that prints the date prints today's."""
    from onward.data.encode import load_encoder
    from onward.data.vision import ImageLimits

    return load_encoder(
        named.base,
        max_length=LONGEST,
        overlong="error",
        loss_on="assistant",
        date=date.today().isoformat(),
        images=ImageLimits(**dict(named.images)) if named.images else None,
        chat_template=named.chat_template,
    )


def load_named(named: Named, *, precision: str, device: str, attention: str = "auto") -> Any:
    """The transformers model, adapters beside it on the base that they were trained on: quantised, where it was.

    DamageError where base and adapter do not fit, TrainingError where memory does not hold them.
    """
    with with_room("a model is loaded", str(named.adapter or named.checkpoint or named.base)):
        return _load(named, precision=precision, device=device, attention=attention)


def _load(named: Named, *, precision: str, device: str, attention: str) -> Any:
    from onward.model.load import load_model
    from onward.model.selection import Selection
    from onward.model.trainable import make_trainable

    if (named.base / PARTS).is_file():
        with tempfile.TemporaryDirectory(prefix="onward-whole-", dir=named.base.parent) as whole:
            join(named.base, Path(whole))
            named = replace(named, base=Path(whole))
            return _load(named, precision=precision, device=device, attention=attention)
    if named.checkpoint and named.start:
        checkpoint = find_checkpoint(named.checkpoint)
        if checkpoint.manifest.base != named.start.fingerprint:
            raise DamageError("was trained on another base than the one that is there", where=str(named.checkpoint))
        beside = beside_base(named.start, checkpoint)
        loaded = load_model(
            named.base, precision=precision, device=device, attention=attention, quantised=beside.quantised
        )
        return make_trainable(loaded, Selection({}, (), (), ()), beside, seed=0, stage="").model.eval()
    quantised = quantised_under(named.adapter) if named.adapter else {}
    loaded = load_model(named.base, precision=precision, device=device, attention=attention, quantised=quantised)
    return (_with_adapter(loaded.model, named.adapter) if named.adapter else loaded.model).eval()


def _with_adapter(model: Any, adapter: Path) -> Any:
    """PEFT puts its own form in place; what it leaves out in silence is an error."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if memory_ended(error):
            raise
        raise DamageError(
            f"PEFT cannot put it on this base: {str(error).splitlines()[0]}", where=str(adapter)
        ) from None
    entries, _ = read_header(adapter / ADAPTER_TENSORS)
    if odd := set(get_peft_model_state_dict(wrapped)) ^ set(entries):
        raise DamageError(f"{len(odd)} tensors have no place in this base, first {min(odd)}", where=str(adapter))
    return wrapped.get_base_model()
