"""`onward assemble --base`: a whole model with other modules, or with what was trained over its modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.files import committed_directory, read_json, require_space, write_json
from onward.foreign import llava
from onward.foreign.converted import as_ours
from onward.foreign.layouts import layout_of
from onward.foreign.layouts.layout import DTYPE
from onward.foreign.pieces import model_pieces
from onward.model.assembly import finished, without_buffers
from onward.model.families import find_family
from onward.model.families.family import WHOLES
from onward.model.partition import into_whole
from onward.model.shapes import parameter_shapes
from onward.model.workshop import Request, Settings, Workshop
from onward.weights.assemble import AssemblyReport, Part, check_assignment, main_dtype, specs_of
from onward.weights.pieces import Piece, Pieces, renamed
from onward.weights.shards import INDEX, PARTS
from onward.weights.sidecars import copy_sidecars
from onward.weights.split import part_pieces

INTERNVL_CHAT = {"language_model": "language_model.", "vision_tower": "vision_model.", "projector": "mlp1."}


@dataclass(frozen=True)
class Naming:
    """`inside`: what the whole calls a module's tensor (module, its name there); `owner`: the module of such a name."""

    inside: Callable[[str, str], str]
    owner: Callable[[str], str]


def over_base(request: Request, out: Path) -> AssemblyReport:
    """Write `request.base` into `out`, with the modules that are given in the place of its own, and what was trained
    over modules added: in a layout that transformers has, whichever the base has.
    """
    assert request.base is not None
    base, shop = request.base, Workshop(request, Settings(request.settings))
    config = read_json(base / "config.json")
    layout = layout_of(config)
    stored = part_pieces(base) if (base / PARTS).is_file() else model_pieces(base)
    names: dict[str, str] = {}
    if layout is None:
        family = find_family(config, str(base / "config.json"))
        canonical = {disk: name for name, disk in family.canonical_names(stored, str(base)).items()}
        names = {canonical.get(disk, disk): disk for disk in stored}  # buffers stay as they are
        pieces = {canonical: stored[disk] for canonical, disk in names.items()}
        naming = Naming(partial(into_whole, family), lambda name: family.whole(name) or "language_model")
    else:
        pieces = without_buffers(stored, shop.left_out)
        naming = _foreign(config)
    for module in WHOLES:
        if module in request.modules:
            pieces |= _replacement(shop, pieces, module, naming)
        pieces = shop.trained(pieces, module, base, partial(naming.inside, module))
    shop.check_all_used()
    shop.settings.check_all_used()
    require_space(out, sum(spec.nbytes for spec in specs_of([Part("", pieces)], request.dtype).values()), "the model")
    with committed_directory(out) as unfinished:
        if layout is None:
            copy_sidecars(base, unfinished)
            (unfinished / INDEX).unlink(missing_ok=True)
            ours = dict(config)
            written = {names[canonical]: piece for canonical, piece in pieces.items()}
        else:
            target, written = as_ours(pieces, layout, config, base, parameter_shapes, shop.left_out)
            ours = target.config
            layout.files(base, unfinished, config, ours)
        parts = _by_module(written, ours)
        if request.dtype or layout:
            ours = {key: value for key, value in ours.items() if key not in DTYPE}
            ours["dtype"] = main_dtype(specs_of(parts, request.dtype).values())
            (unfinished / "config.json").unlink(missing_ok=True)
            write_json(unfinished / "config.json", ours)
        return finished(unfinished, shop, parts)


def _foreign(config: dict[str, Any]) -> Naming:
    """The names of a layout of foreign code: a language model's alone, or InternVL's."""
    if "vision_config" not in config:
        return Naming(lambda module, name: name, lambda name: "language_model")

    def inside(module: str, name: str) -> str:
        return name if module == "projector" else INTERNVL_CHAT[module] + name

    return Naming(inside, lambda name: next(m for m, prefix in INTERNVL_CHAT.items() if name.startswith(prefix)))


def _replacement(shop: Workshop, pieces: Pieces, module: str, naming: Naming) -> dict[str, Piece]:
    """All of a module from another place. InputError unless it has exactly the tensors that the base has there."""
    path = shop.request.modules[module]
    given = without_buffers(shop.open(path, module).pieces(module), shop.left_out)
    expected = {name: piece.shape for name, piece in pieces.items() if naming.owner(name) == module}
    if not expected:
        raise InputError(f"has no {module}", where=str(shop.request.base))
    if module == "projector" and not any(naming.inside(module, name) in expected for name in given):
        names = llava.projector_names(given, str(path))  # in another tool's numbering
        given = renamed(given, names.__getitem__)
    new = renamed(given, partial(naming.inside, module))
    check_assignment(expected, [Part(module, new)])
    return new


def _by_module(pieces: Pieces, config: dict[str, Any]) -> list[Part]:
    """Runs of tensors of one module, in the order that they have in the files."""
    family = find_family(config, "config.json")

    def module(name: str) -> str:
        return family.whole(family.to_canonical(name)) or "language_model"

    return [Part(found, {name: pieces[name] for name in names}) for found, names in groupby(pieces, module)]
