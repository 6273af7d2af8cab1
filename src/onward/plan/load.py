"""A plan file, read strictly: every mistake of it in one error, each with its line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onward.errors import PlanError
from onward.plan.document import Key, parse, read_document
from onward.plan.draft import Draft
from onward.plan.schema import Plan, Shared
from onward.plan.wording import mistakes


@dataclass(frozen=True)
class LoadedPlan:
    """A plan and where each of its values was written.

    `written` is the file as parsed: plain JSON values, `defaults` still in place, overrides not applied.
    `overrides` are those of the command line (dotted key → value, stages by name) over the standing ones of the run.
    `lines` are the lines of the file's keys, `origins` the key of the file (or the text of the override) from which a
    key of the resolved plan has its value.
    """

    plan: Plan
    path: Path
    written: dict[str, Any]
    overrides: dict[str, Any]
    lines: Mapping[Key, int]
    origins: Mapping[Key, Key | str]

    @property
    def name(self) -> str:
        return self.path.stem

    def resolve(self, path: str) -> Path:
        """A path that the plan names: relative to the directory of the plan file."""
        return self.path.parent / Path(path).expanduser()

    def where(self, *key: str | int) -> str:
        """`plan.yaml:14: stages.sft.train.projectr`, or `command line: stages.sft.epochs=3` where an override set it.

        A stage is given by its name or its number. The line is that of the nearest key that was written.
        """
        names: list[str | int] = [stage.name for stage in self.plan.stages]
        if key[:1] == ("stages",) and len(key) > 1 and key[1] in names:
            key = ("stages", names.index(key[1]), *key[2:])
        return _place(self.path, self.lines, Draft(self.written, dict(self.origins)), key)[1]


def load_plan(path: Path, overrides: Sequence[str] = (), standing: Mapping[str, Any] | None = None) -> LoadedPlan:
    """The plan of a file, with `KEY=VALUE` overrides over the `standing` ones that the run's lock holds.

    Stages take from `defaults` what they do not say themselves. Mappings (`schedule`, `optimizer`, `evaluate`,
    `output`) are joined key by key, so that `schedule: {name: linear}` keeps the warm-up of defaults; single values
    and lists (so `data` too) replace; null clears what can be empty. A stage's warmup_steps stands for the
    warmup_ratio of defaults, and the other way round. An override of a whole mapping replaces it like an edit of the
    file would.

    PlanError with all mistakes, each as `file:line: key: what is wrong`.
    """
    written, lines = read_document(path)
    return plan_from(written, lines, path, overrides, standing)


def plan_from(
    written: Any,
    lines: Mapping[Key, int],
    path: Path,
    overrides: Sequence[str] = (),
    standing: Mapping[str, Any] | None = None,
) -> LoadedPlan:
    """`load_plan` of a file's values and lines. `path` is where its relative paths begin."""
    if not isinstance(written, dict):
        is_empty = written is None
        raise PlanError(
            "the file is empty" if is_empty else "a plan is a mapping: model: …, stages: …", where=str(path)
        )
    draft = Draft.of(written)
    problems: list[tuple[int, str]] = []
    applied: dict[str, Any] = {}
    for said in [*(standing or {}).items(), *overrides]:
        try:
            key, value, origin = _split(said) if isinstance(said, str) else (*said, f"an override before: {said[0]}")
            shown = draft.override(key, value, origin)
        except PlanError as error:
            problems.append((0, str(error)))
        else:
            applied.pop(shown, None)  # the newest last, as they are applied
            applied[shown] = value
    resolved = draft.resolved()
    for mistake_key, message in _all_mistakes(draft, resolved):
        line, place = _place(path, lines, resolved, mistake_key)
        if (line, f"{place}: {message}") not in problems:
            problems.append((line, f"{place}: {message}"))
    if problems:
        raise PlanError("\n".join(text for _, text in sorted(problems, key=lambda problem: problem[0])))
    plan = Plan.model_validate_json(json.dumps(resolved.value), strict=True)
    return LoadedPlan(plan, path, written, applied, lines, resolved.origins)


def _split(override: str) -> tuple[str, Any, str]:
    """KEY=VALUE as key, value (read as YAML) and the words for where it came from."""
    origin = f"command line: {override}"
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise PlanError("an override is KEY=VALUE, like stages.sft.epochs=3 (null clears)", where=origin)
    try:
        return key.strip(), parse(text, origin)[0], origin
    except PlanError as error:
        raise PlanError(error.message, where=origin) from None


def _all_mistakes(draft: Draft, resolved: Draft) -> list[tuple[Key, str]]:
    found: list[tuple[Key, str]] = []
    defaults = draft.value.get("defaults")
    if defaults is not None:
        try:
            Shared.model_validate_json(json.dumps(defaults), strict=True)
        except ValidationError as error:
            # what is missing under defaults, a stage may still give
            found += [item for item in mistakes(error, defaults, ("defaults",)) if not item[1].startswith("missing")]
    try:
        Plan.model_validate_json(json.dumps(resolved.value), strict=True)
    except ValidationError as error:
        found += mistakes(error, resolved.value)
    return found


def _place(path: Path, lines: Mapping[Key, int], draft: Draft, key: Key) -> tuple[int, str]:
    """The line and the words for where a key of the resolved plan was (or should have been) written."""
    for length in range(len(key), 0, -1):
        origin = draft.origins.get(key[:length])
        if isinstance(origin, str):
            return 0, origin
        if origin is not None:
            key = (*origin, *key[length:])
            break
    known = [key[:length] for length in range(len(key), 0, -1) if key[:length] in lines]
    line = lines[known[0]] if known else 1
    return line, f"{path}:{line}: {draft.shown(key)}".removesuffix(": ")
