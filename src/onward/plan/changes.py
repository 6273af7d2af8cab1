"""What a change means for a run that exists: the judgement over what changed, by the table in plan/table.py.

| kind | what happens |
|---|---|
| free | applied and recorded |
| forward | a stage that has not begun: applied and recorded |
| acceptable | refused unless accepted by name; then recorded, from this step on |
| breaking | refused: another plan is another run, which `onward fork` may branch off from a checkpoint |
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from onward.errors import PlanError
from onward.plan.lock import Kind, plan_values
from onward.plan.schema import Plan
from onward.plan.suggest import closest
from onward.plan.table import BREAKING, ENVIRONMENT_BY_PLAN, FORWARD, TABLE, TIERS, Tier

# What a fork gives up: nothing; its place in data and schedule; the optimizer's state too; everything, as a new run.
Cost = Literal["nothing", "place", "optimizer", "everything"]


@dataclass(frozen=True)
class Change:
    """One key that is no longer what the run was begun (or last continued) with."""

    key: str
    before: Any
    after: Any
    kind: Kind
    stage: str | None = None
    holds: Tier = "bitwise"  # the tier once it is applied
    why: str = ""  # the kind, where the table alone does not explain it

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return change_text(self.key, self.before, self.after) + why


def change_text(key: str, before: Any, after: Any) -> str:
    """A change for people."""
    return f"{key}: {_shown(before)} → {_shown(after)}"


@dataclass(frozen=True)
class Judgement:
    """Which promise holds after the changes, and why. With `refused` ones none is to be applied."""

    tier: Tier
    applied: list[Change]
    refused: list[Change]
    reasons: list[str]


def plan_changes(old: Plan, new: Plan, begun: Collection[str], finished: Collection[str] = frozenset()) -> list[Change]:
    """What differs between two resolved plans, for a run in which the stages `begun` (by name) have taken a step.

    In stages that have not begun everything is `forward`. In those of `begun` that are `finished` nothing can be
    accepted any more: what they trained would have to be trained again.
    """
    before, after = plan_values(old), plan_values(new)
    old_stages = {stage["name"]: stage for stage in before.pop("stages")}
    new_stages = {stage["name"]: stage for stage in after.pop("stages")}
    changes = [_plan_change(key, was, now, None) for key, was, now in _differences(before, after, ())]
    changes += _order_change(list(old_stages), list(new_stages), begun)
    for name in old_stages.keys() & new_stages.keys():
        for key, was, now in _differences(old_stages[name], new_stages[name], ("stages", name)):
            change = _plan_change(key, was, now, name)
            if name not in begun:
                change = replace(change, kind=FORWARD[0], holds=FORWARD[1])
            elif name in finished and change.kind == "acceptable":
                change = replace(change, kind=BREAKING[0], holds=BREAKING[1], why="its stage is finished")
            changes.append(change)
    return sorted(changes, key=lambda change: change.key)


def cost(change: Change) -> Cost:
    """What a fork gives up to take on a change of its stage.

    A place in the data means something only in the same data and batches; an optimizer's state belongs to the
    parameters that it was gathered on.
    """
    match change.key.split("."):
        case ["content", "data" | "encoding", _]:
            return "place"
        case ["content", "evaluation" | "optimizer" | "augment", _]:
            return "nothing"
        case ["content", *_] | ["stages"]:
            return "everything"
        case ["stages", _, "batch_size" | "max_length" | "overlong" | "loss_on"] if change.kind == "breaking":
            return "place"
        case ["stages", _, "data" | "images", *_] if change.kind == "breaking":
            return "place"
        case ["stages", _, "train", *_] | ["stages", _, "optimizer", "name"] if change.kind == "breaking":
            return "optimizer"
    return "nothing"


def environment_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[Change]:
    """Versions, device, threads, engine, switches: what differs, as acceptable changes `environment.NAME`."""
    return [
        Change(f"environment.{name}", old.get(name), new.get(name), "acceptable", None, "state-exact")
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def fingerprint_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], begun: Collection[str] | None = None
) -> list[Change]:
    """Content that is no longer the same: breaking changes `content.model`, `content.data.STAGE`, …; what a stage is
    only measured on (`content.evaluation.STAGE`) is acceptable, so is other code of the user's optimizer or augment.

    Two levels: a mapping under a name is by stage. With `begun`, other stages' content is `forward`.
    """
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) or isinstance(after, dict):
            before, after = before or {}, after or {}
            for stage in sorted(before.keys() | after.keys()):
                if before.get(stage) != after.get(stage):
                    is_ahead = begun is not None and stage not in begun
                    declared: tuple[Kind, Tier] = ("acceptable", "declared")
                    is_declared = name in ("evaluation", "optimizer", "augment")
                    kind, holds = FORWARD if is_ahead else declared if is_declared else BREAKING
                    key = f"content.{name}.{stage}"
                    changes.append(Change(key, before.get(stage), after.get(stage), kind, stage, holds))
        elif before != after:
            changes.append(Change(f"content.{name}", before, after, "breaking", None, "refused"))
    return changes


def judge(changes: Sequence[Change], accepted: Collection[str] = ()) -> Judgement:
    """Which promise holds when `changes` are applied, those acceptable ones only that `accepted` names.

    A name is a whole key (`stages.sft.learning_rate`), the end of one (`learning_rate`: in all stages), or
    `environment` for all of it. PlanError for a name that no change could ever have.
    """
    check_names(accepted, changes)
    applied, refused, reasons = [], [], []
    for change in changes:
        is_said = any(_follows(change, other) for other in changes)
        if change.kind in ("free", "forward") or is_said:
            applied.append(change)
            why = "this stage has not begun" if change.kind == "forward" else "free to change"
            reasons.append(f"{change} ({'follows from the plan' if is_said else why})")
        elif change.kind == "acceptable" and is_named(change, accepted):
            applied.append(change)
            reasons.append(f"{change} (accepted, from this step on)")
        else:
            refused.append(change)
            needs = (
                f"needs --accept {accept_name(change)}" if change.kind == "acceptable" else "makes another run of it"
            )
            reasons.append(f"{change} ({needs})")
    tier: Tier = max((change.holds for change in applied), key=TIERS.index, default="bitwise")
    return Judgement("refused" if refused else tier, applied, refused, reasons or ["same plan, same environment"])


def _differences(old: Any, new: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Leaves that differ: below mappings, and below lists of mappings that are as long as before."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in (*old, *(name for name in new if name not in old)):
            yield from _differences(old.get(name), new.get(name), (*key, name))
    elif _are_mappings(old) and _are_mappings(new) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, (*key, str(index)))
    elif old != new:
        yield key, old, new


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _plan_change(key: tuple[str, ...], before: Any, after: Any, stage: str | None) -> Change:
    kind, holds = meaning(key)
    return Change(".".join(key), before, after, kind, stage, holds)


def meaning(key: Sequence[str]) -> tuple[Kind, Tier]:
    """The table's row for a key, given part by part: a module's name may hold dots.

    What stands below a row's value (an option of the user's optimizer) has that row.
    """
    for length in range(len(key), 0, -1):
        for pattern, row in TABLE.items():
            parts = pattern.split(".")
            if len(parts) == length and all(
                part in ("*", name) for part, name in zip(parts, key[:length], strict=True)
            ):
                return row
    raise KeyError(".".join(key))


def _order_change(old: list[str], new: list[str], begun: Collection[str]) -> list[Change]:
    if old == new:
        return []
    fixed = max((old.index(name) + 1 for name in begun if name in old), default=0)
    is_forward = old[:fixed] == new[:fixed]
    kind, holds = FORWARD if is_forward else BREAKING
    return [Change("stages", old, new, kind, None, holds)]


def is_named(change: Change, accepted: Collection[str]) -> bool:
    """Does one of the names accept the change?"""
    return any(_names(name, change.key) for name in accepted)


def _names(name: str, key: str) -> bool:
    is_area = name in ("environment", "content") and key.startswith(f"{name}.")
    return key == name or key.endswith(f".{name}") or is_area


def accept_name(change: Change) -> str:
    area, _, _ = change.key.partition(".")
    return area if area in ("environment", "content") else change.key.rsplit(".", 1)[-1]


def _follows(change: Change, other: Change) -> bool:
    """Does the change only follow from another one, of the plan, which has to be said (or not) itself?"""
    if change.key.startswith("content.evaluation."):
        measured = f"stages.{change.stage}.evaluate"
        is_of_data = other.key == measured or other.key.startswith(f"{measured}.data")
        return is_of_data and other.kind == "acceptable"
    if change.key.startswith("content.augment."):
        data = f"stages.{change.stage}.data"
        return other.key == data or (other.key.startswith(f"{data}.") and other.key.endswith(".augment"))
    return ENVIRONMENT_BY_PLAN.get(change.key) == other.key


def check_names(accepted: Collection[str], changes: Sequence[Change]) -> None:
    """A misspelt --accept is an error; one that nothing needs (any more) is not: the same command must work twice."""
    known = {pattern.rsplit(".", 1)[-1] for pattern in TABLE} - {"*"} | {"environment", "content"}
    for name in accepted:
        if (
            name.rsplit(".", 1)[-1] in known
            or name.startswith(("environment.", "content."))
            or any(_names(name, change.key) for change in changes)
        ):
            continue
        near = closest(name, known)
        hint = f"did you mean {near}?" if near else "a key of the plan, or environment"
        raise PlanError(f"no key is called {name}; {hint}", where=f"command line: --accept {name}")


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return f"{value[:19]}…"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
