"""A plan against its model: what each stage trains, found from headers alone, before it costs time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onward.errors import PlanError
from onward.model.directory import ModelDirectory, open_model_directory
from onward.model.families import WHOLES
from onward.model.selection import LoraLayer, Selection, looks_linear, select
from onward.plan.functions import require_arguments
from onward.plan.load import LoadedPlan
from onward.plan.schema import Source, Stage
from onward.plan.suggest import closest
from onward.runs.device import require_device
from onward.runs.hub import hub_directory, is_hub_id
from onward.weights.quantised import Quantisation

if TYPE_CHECKING:
    from onward.data.prepare import ResolvedSource


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with the table of what it trains, as far as headers tell, and its data files."""

    plan: Stage
    selection: Selection
    sources: tuple[ResolvedSource, ...]
    evaluation: tuple[ResolvedSource, ...]


@dataclass(frozen=True)
class Resolved:
    """A plan whose every name was found. `chat_template`: the text of the one that the plan names."""

    loaded: LoadedPlan
    model: ModelDirectory
    stages: tuple[ResolvedStage, ...]
    chat_template: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(stage.plan.name for stage in self.stages)


def resolve(loaded: LoadedPlan, starts: Collection[str] = ()) -> Resolved:
    """Find the model, its parameters, the data. `starts`: stages that a fork gave a model of their own to begin from.

    One PlanError with every mistake; InputError or DamageError for the model.
    """
    model = open_model_directory(model_directory(loaded))
    problems: list[str] = []
    selections, template = [], None
    with _noted(problems):
        template = chat_template_of(loaded)
    carried: dict[str, LoraLayer] = {}
    carried_full: set[str] = set()
    quantised: dict[str, Quantisation] = {}
    for number, stage in enumerate(loaded.plan.stages):
        where = {key: loaded.where("stages", number, "train", key) for key in stage.train}
        if stage.name in starts:
            carried, carried_full, quantised = {}, set(), {}
        with _noted(problems):
            selection = select_from(model, stage, where)
            selections.append(selection)
            _fits_what_is_carried(selection, carried, quantised, where)
            if stage.output.form != "adapters":
                carried, carried_full, quantised = {}, set(), {}
            else:
                quantised |= selection.quantised
                carried |= {layer.layer: layer for layer in selection.lora}
                carried_full |= set(selection.full)
                _fits_in_an_adapter(model, carried, carried_full, loaded.where("stages", number, "output"))
        for key, sources in (("data",), stage.data), (("evaluate", "data"), _held_out(stage)):
            for index, source in enumerate(sources):
                with _noted(problems):
                    _require_files(loaded, source, loaded.where("stages", number, *key, index))
        with _noted(problems):
            _require_metrics(stage, loaded.where("stages", number, "evaluate", "metrics"))
        with _noted(problems):
            require_device(loaded, number, stage)
    if problems:
        raise PlanError("\n".join(problems))
    stages = [
        ResolvedStage(stage, selection, _sources(loaded, stage.data), _sources(loaded, _held_out(stage)))
        for stage, selection in zip(loaded.plan.stages, selections, strict=True)
    ]
    return Resolved(loaded, model, tuple(stages), template)


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """A mistake in the block is one of `problems`; the search for others goes on."""
    try:
        yield
    except PlanError as error:
        problems.append(str(error))


def select_from(
    model: ModelDirectory, stage: Stage, where: Mapping[str, str], linear: Collection[str] | None = None
) -> Selection:
    """A stage's table from a model directory's headers. `linear`: weights of linear layers, where known."""
    shapes = {name: entry.shape for name, entry in model.parameters().items()}
    if linear is None:
        linear = {name for name, shape in shapes.items() if looks_linear(name, shape)}
    return select(stage, model.family, shapes, linear, tied=model.tied, where=where)


def model_directory(loaded: LoadedPlan) -> Path:
    """The directory of the plan's model: one beside the plan or a path of its own, a hub id's snapshot, or what its
    parts make up; with the plan's tokens added.
    """
    base, plan = _without_tokens(loaded), loaded.plan
    if not (plan.add_tokens or plan.add_special_tokens or plan.pad_to_multiple_of):
        return base
    from onward.model.tokens import extended_model

    where = loaded.where("add_tokens" if plan.add_tokens else "add_special_tokens")
    return extended_model(base, plan.add_tokens, plan.add_special_tokens, plan.pad_to_multiple_of, where)


def _without_tokens(loaded: LoadedPlan) -> Path:
    model, where = loaded.plan.model, loaded.where("model")
    if isinstance(model, str):
        return _found(loaded, model, where)
    from onward.model.parts import whole_model

    settings = model.model_dump(exclude_none=True, exclude={"family", "precision", *WHOLES})
    if "image_processor" in settings:
        place = _found(loaded, settings["image_processor"], loaded.where("model", "image_processor"))
        settings["image_processor"] = str(place)
    parts = parts_of(loaded)
    try:
        return whole_model(model.family, parts, settings, dtype=model.precision, seed=loaded.plan.seed)
    except PlanError as error:  # told as of assemble's command line
        raise PlanError(error.message, where=where, hint=error.hint) from None


def parts_of(loaded: LoadedPlan) -> dict[str, Path]:
    """Where the parts of a plan's model lie, by module; a projector that is to be drawn is not among them."""
    from onward.model.parts import NEW

    model = loaded.plan.model
    given = {} if isinstance(model, str) else {module: getattr(model, module) for module in WHOLES}
    return {
        module: _found(loaded, name, loaded.where("model", module))
        for module, name in given.items()
        if (module, name) != NEW
    }


def _found(loaded: LoadedPlan, name: str, where: str) -> Path:
    path = loaded.resolve(name)
    if path.exists():
        return path
    near = closest(path.name, [item.name for item in path.parent.iterdir()]) if path.parent.is_dir() else None
    meant = f"did you mean {Path(name).with_name(near)}?" if near else None
    if not is_hub_id(name):
        raise PlanError(f"no such model directory: {path}", where=where, hint=meant)
    try:
        return hub_directory(name, where)
    except PlanError as error:
        raise PlanError(error.message, where=error.where, hint=meant or error.hint) from None


def _held_out(stage: Stage) -> tuple[Source, ...]:
    return stage.evaluate.data if stage.evaluate else ()


def _require_files(loaded: LoadedPlan, source: Source, where: str) -> None:
    from onward.data.sources import find_files

    try:
        find_files(loaded.resolve(source.path))
    except PlanError as error:
        raise PlanError(f"{error.message}: {error.where}", where=where, hint=error.hint) from None


def _sources(loaded: LoadedPlan, sources: Sequence[Source]) -> tuple[ResolvedSource, ...]:
    from onward.data.prepare import ResolvedSource  # takes seconds

    return tuple(
        ResolvedSource(
            loaded.resolve(source.path),
            source.repeat,
            source.weight,
            source.augment,
            source.fingerprint,
            source.format,
            tuple(source.columns.items()),
        )
        for source in sources
    )


def chat_template_of(loaded: LoadedPlan) -> str | None:
    """The text of the plan's chat template: one of onward's own by name, or a file."""
    from onward.data.template import TEMPLATES, named_templates

    name = loaded.plan.chat_template
    if name is None:
        return None
    file = TEMPLATES / f"{name}.jinja" if name in named_templates() else loaded.resolve(name)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{name} is no template's name, and no file that can be read ({error})",
            where=loaded.where("chat_template"),
            hint=f"the names are {', '.join(named_templates())}",
        ) from None


def _require_metrics(stage: Stage, where: str) -> None:
    """The functions of the user's by which a stage is measured must be there."""
    for metric in stage.evaluate.metrics if stage.evaluate else ():
        if ":" in metric:
            try:
                require_arguments(metric, "prediction", "reference", "row")
            except PlanError as error:
                raise PlanError(error.message, where=where, hint=error.hint) from None


def _fits_what_is_carried(
    selection: Selection,
    carried: Mapping[str, LoraLayer],
    quantised: Mapping[str, Quantisation],
    where: Mapping[str, str],
) -> None:
    """Adapters handed on unmerged go on as they are: same rank, scale and kind, on the base that they were trained on,
    and no full training under them.
    """
    hint = "let the stage before hand on `output: merged`, or keep rank, alpha, use_rslora, use_dora and bits"
    for layer in selection.lora:
        before = carried.get(layer.layer)
        key = selection.owner[layer.layer + ".weight"]
        if before and key and replace(before, dropout=0) != replace(layer, dropout=0):
            raise PlanError(f"goes on with adapters of {before}, not {layer}", where=where[key], hint=hint)
        if before and key and quantised.get(layer.layer) != selection.quantised.get(layer.layer):
            was, now = (place.get(layer.layer, "not quantised") for place in (quantised, selection.quantised))
            raise PlanError(
                f"goes on with adapters whose base was {was}, which is {now} here", where=where[key], hint=hint
            )
    if odd := [
        c for c in carried.values() for own in selection.lora[:1] if (c.rslora, c.dora) != (own.rslora, own.dora)
    ]:
        key = selection.owner[selection.lora[0].layer + ".weight"] or ""
        raise PlanError(
            f"{odd[0].layer} carries adapters of {odd[0]}, to which these of {selection.lora[0]} cannot be added: "
            "PEFT says use_rslora and use_dora once an adapter",
            where=where[key],
            hint=hint,
        )
    for name in selection.full:
        key = selection.owner[name]
        if name.removesuffix(".weight") in carried and key:
            raise PlanError(
                f"{name} carries adapters of an earlier stage and cannot train in full under them",
                where=where[key],
                hint=hint,
            )


def _fits_in_an_adapter(model: ModelDirectory, carried: Mapping[str, LoraLayer], full: set[str], where: str) -> None:
    """A PEFT directory holds a layer as an adapter or as a whole, not both, and no embedding that is the head too."""
    reason = "" if carried else "no stage up to here trains adapters"
    for name in sorted(full):
        if name.removesuffix(".weight") in carried:
            reason = f"{name} is trained in full and has adapters: a PEFT directory cannot hold both"
        if model.tied and name.endswith("embed_tokens.weight"):
            reason = f"{name} is tied to the head and trained in full: PEFT would untie them"
    if reason:
        raise PlanError(f"form: adapters, but {reason}", where=where, hint="say `output: merged`")
