"""From the values of a plan file to those of a resolved plan: shorthands, overrides, defaults.

A draft keeps for each value where it was written, so that an error names the line (or the override) to mend even when
the value reached a stage through `defaults`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from onward.errors import PlanError
from onward.plan.document import Key
from onward.plan.learning import Train

SHORTHANDS = {"schedule": "name", "optimizer": "name", "output": "form", "gate": "require"}
ALTERNATIVES = {
    "warmup_ratio": "warmup_steps",
    "warmup_steps": "warmup_ratio",
    "min_lr_ratio": "min_learning_rate",
    "min_learning_rate": "min_lr_ratio",
    "decay_ratio": "decay_steps",
    "decay_steps": "decay_ratio",
}  # a stage that gives one does not want the other from defaults

# What an optimizer or a schedule of another name than defaults' takes from defaults; all else belongs to the name.
SHARED_BY_ALL = {"optimizer": ("adamw", {"weight_decay"}), "schedule": ("cosine", {"warmup_ratio", "warmup_steps"})}


@dataclass
class Draft:
    """Values on their way to a plan.

    `origins` says for a key of `value` where it was written: a key of the file, or the text of an override.
    """

    value: dict[str, Any]
    origins: dict[Key, Key | str] = field(default_factory=dict)

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> Draft:
        """A draft of a file's values, shorthands written out."""
        value = copy.deepcopy(dict(written))
        draft = cls(value, {key: key for key in _keys(value)})
        draft._write_out_shorthands()
        return draft

    def override(self, dotted: str, new: Any, origin: str) -> str:
        """Set one key; the dotted key with stages by name. PlanError for a stage or place that is not there."""
        key = self._find(dotted, origin)
        node: Any = self.value
        for depth, part in enumerate(key[:-1], start=1):
            below = _below(node, part)
            if below is None:
                below = node[part] = {}
                self.origins[key[:depth]] = origin
            node = below
        shown = self.shown(key)
        node[key[-1]] = copy.deepcopy(new)
        self._forget(key)
        self.origins[key] = origin
        self._write_out_shorthands()
        return shown

    def resolved(self) -> Draft:
        """A draft without `defaults`: each stage has them, as far as it does not say otherwise."""
        result = Draft({key: value for key, value in self.value.items() if key != "defaults"}, dict(self.origins))
        defaults, stages = self.value.get("defaults"), self.value.get("stages")
        if isinstance(defaults, dict) and isinstance(stages, list):
            result.value["stages"] = [
                result._inherit(defaults, stage, ("defaults",), ("stages", index)) if isinstance(stage, dict) else stage
                for index, stage in enumerate(stages)
            ]
        return result

    def shown(self, key: Key) -> str:
        """A key as the user writes it: dotted, stages by name."""
        parts = list(key)
        if parts[:1] == ["stages"] and len(parts) > 1 and isinstance(parts[1], int):
            stages = self.value.get("stages")
            stage = stages[parts[1]] if isinstance(stages, list) and parts[1] < len(stages) else None
            if isinstance(stage, dict) and isinstance(stage.get("name"), str):
                parts[1] = stage["name"]
        return ".".join(map(str, parts))

    def _find(self, dotted: str, origin: str) -> Key:
        """The path of a dotted key. A module's name or pattern may hold dots itself; a list of one needs no index."""
        parts, key = dotted.split("."), list[str | int]()
        if not all(parts):
            raise PlanError("a key is names with dots between them, like stages.sft.epochs", where=origin)
        node: Any = self.value
        while parts:
            if key == ["stages"]:
                key.append(self._stage(parts.pop(0), origin))
            elif len(key) == 3 and key[0] == "stages" and key[2] == "train":
                module, parts = _split_module(parts, node or {})
                key.append(module)
            elif isinstance(node, list):
                if parts[0].isdigit() and int(parts[0]) < len(node):
                    key.append(int(parts.pop(0)))
                elif len(node) == 1 and not parts[0].isdigit():
                    key.append(0)
                else:
                    raise PlanError(f"{self.shown(tuple(key))} has items 0 to {len(node) - 1}", where=origin)
            elif isinstance(node, dict) or node is None:
                key.append(parts.pop(0))
            else:
                raise PlanError(f"{self.shown(tuple(key))} has no keys below it", where=origin)
            node = _below(node, key[-1])
        return tuple(key)

    def _stage(self, name: str, origin: str) -> int:
        stages = self.value.get("stages")
        stages = stages if isinstance(stages, list) else []
        names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
        if name in names:
            return names.index(name)
        if name.isdigit() and int(name) < len(names):
            return int(name)
        known = [str(known) for known in names if known is not None]
        raise PlanError(f"no stage is called {name}; the stages are {', '.join(known) or 'none'}", where=origin)

    def _inherit(self, default: dict[str, Any], own: dict[str, Any], base: Key, at: Key) -> dict[str, Any]:
        merged = dict(own)
        usual, shared = SHARED_BY_ALL.get(str(base[-1]), (None, set[str]()))
        is_other = usual is not None and own.get("name") not in (None, default.get("name", usual))
        for key, value in default.items():
            if is_other and key not in shared:
                continue
            if isinstance(value, dict) and isinstance(own.get(key), dict):
                merged[key] = self._inherit(value, own[key], (*base, key), (*at, key))
            elif key not in own and own.get(ALTERNATIVES.get(key, "")) is None:
                merged[key] = copy.deepcopy(value)
                self._copy_origins((*base, key), (*at, key))
        return merged

    def _write_out_shorthands(self) -> None:
        """`schedule: linear` → {name: linear}; data as a path or one mapping → a list of mappings; a gate's `stop`."""
        stages = self.value.get("stages")
        blocks: list[tuple[Key, Any]] = [(("defaults",), self.value.get("defaults"))]
        if isinstance(stages, list):
            blocks += [(("stages", index), stage) for index, stage in enumerate(stages)]
        for at, block in blocks:
            if not isinstance(block, dict):
                continue
            for key, inner in SHORTHANDS.items():
                if isinstance(block.get(key), str):
                    block[key] = {inner: block[key]}
                    self._copy_origins((*at, key), (*at, key, inner))
            self._list_sources(block, at)
            if isinstance(block.get("gate"), dict) and block["gate"].get("otherwise") == "stop":
                block["gate"]["otherwise"] = {}
            if isinstance(block.get("evaluate"), dict):
                self._list_sources(block["evaluate"], (*at, "evaluate"))

    def _list_sources(self, block: dict[str, Any], at: Key) -> None:
        data = block.get("data")
        if isinstance(data, str | dict):
            whole = (*at, "data")
            known = {key: origin for key, origin in self.origins.items() if key[: len(whole)] == whole}
            self._forget(whole)
            self.origins.update({(*whole, 0, *key[len(whole) :]): origin for key, origin in known.items()})
            if whole in known:  # not where an override gave the whole mapping around it
                self.origins[whole] = known[whole]
            data = block["data"] = [data]
        if isinstance(data, list):
            for index, source in enumerate(data):
                if isinstance(source, str):
                    data[index] = {"path": source}
                    self._copy_origins((*at, "data", index), (*at, "data", index, "path"))

    def _copy_origins(self, old: Key, new: Key) -> None:
        found = {key: origin for key, origin in self.origins.items() if key[: len(old)] == old}
        self.origins.update({(*new, *key[len(old) :]): origin for key, origin in found.items()})

    def _forget(self, key: Key) -> None:
        for known in [known for known in self.origins if known[: len(key)] == key]:
            del self.origins[known]


def _below(node: Any, part: str | int) -> Any:
    """What stands at one key or index; None when nothing does."""
    return node[int(part)] if isinstance(node, list) else (node or {}).get(part)


def _split_module(parts: list[str], modules: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The module (a name or a pattern, dots included) that a dotted key speaks of, and what is left of the key."""
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in modules:
            return ".".join(parts[:length]), parts[length:]
    if len(parts) > 1 and (parts[-1] in Train.model_fields or len(parts) == 2):
        return ".".join(parts[:-1]), parts[-1:]
    return ".".join(parts), []


def _keys(value: Any, key: Key = ()) -> Iterator[Key]:
    """Every key of a value, at all depths."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*key, name)
        yield from _keys(item, (*key, name))
