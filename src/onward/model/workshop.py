"""What `onward assemble` is asked for, and the sources that it has open: which modules of them were used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.errors import InputError, PlanError
from onward.foreign.sources import Source, open_source, trained_over
from onward.model.families.family import WHOLES
from onward.weights.pieces import Piece, Pieces


@dataclass(frozen=True)
class Request:
    """The command line: a `family` of which every module is given, or a `base` of which some are.

    `adapters`: (module, path) in order, what was trained over a module. `settings`: --set, by key.
    """

    modules: Mapping[str, Path]
    adapters: Sequence[tuple[str, Path]] = ()
    family: str | None = None
    base: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    def __post_init__(self) -> None:
        for module in (*self.modules, *(module for module, _ in self.adapters)):
            if module not in WHOLES:
                raise PlanError(f"{module} is no module; they are {', '.join(WHOLES)}", where="command line")


@dataclass
class Settings:
    """What parts state, what the user sets and what is assumed: each key asked for once, `given` before all else."""

    given: Mapping[str, Any]
    stated: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any) -> Any:
        """The value of `key`; `default` where neither the user nor a part says, which is told then."""
        if key in self.given:
            self.used.add(key)
            return self.given[key]
        if key in self.stated:
            return self.stated[key]
        self.assumed[key] = default
        return default

    def of(self, module: str) -> dict[str, Any]:
        """What the user gives as `MODULE.key`."""
        prefix = f"{module}."
        found = {key: value for key, value in self.given.items() if key.startswith(prefix)}
        self.used |= found.keys()
        return {key.removeprefix(prefix): value for key, value in found.items()}

    def check_all_used(self) -> None:
        """PlanError for a setting that nothing asked for."""
        if unused := sorted(self.given.keys() - self.used):
            raise PlanError(f"--set {unused[0]}: nothing here asks for it", where="command line")


@dataclass
class Workshop:
    """Everything that is open. `left_out`: what sources hold and the whole has not, each with the reason."""

    request: Request
    settings: Settings
    sources: dict[Path, Source] = field(default_factory=dict)
    used: set[tuple[Path, str]] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)

    def open(self, path: Path, module: str) -> Source:
        """A source, of which `module` is going to be used. What it states of the whole is noted."""
        if path not in self.sources:
            self.sources[path] = open_source(path)
        source = self.sources[path]
        self.used.add((path, module if module in source.modules else ""))
        if source.settings and source.settings.select_layer is not None:
            self.settings.stated["vision_feature_layer"] = source.settings.select_layer
        return source

    def trained(self, pieces: Pieces, module: str, where: Path, rename: Callable[[str], str]) -> dict[str, Piece]:
        """`pieces` with every --adapter of the module over them, `rename` giving their names of its tensors.

        InputError where two adapters change one tensor.
        """
        result, changed = dict(pieces), dict[str, Path]()
        given = self.settings.of(module)
        for path in (path for name, path in self.request.adapters if name == module):
            before = result
            result = trained_over(result, self.open(path, module), module, given, rename, str(where))
            for name in (name for name, piece in result.items() if before.get(name) is not piece):
                if name in changed:
                    raise InputError(f"is changed by {changed[name]} and by {path}", where=name)
                changed[name] = path
        return result

    def check_all_used(self) -> None:
        """InputError for a checkpoint of what was trained of which a module went nowhere."""
        for path, source in self.sources.items():
            for module, pieces in source.modules.items():
                if source.trained and (path, module) not in self.used:
                    raise InputError(
                        f"{len(pieces)} tensors of {module} are used by nothing, first {next(iter(pieces))}",
                        where=str(path),
                        hint=f"add --adapter {module}={path}",
                    )
                if module and (path, module) not in self.used:
                    self.left_out[f"{module} of {path}"] = "another is taken"
