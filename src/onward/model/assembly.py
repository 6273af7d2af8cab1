"""`onward assemble --family`: a vision-language model from a language model, a vision tower and a projector."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.tensorfile import FileRecord
from onward.errors import InputError, PlanError
from onward.files import committed_directory, digest_file, read_json, require_new, require_space
from onward.foreign import llava
from onward.foreign.converted import HEAD, converted, without_tied_head
from onward.foreign.layouts import Layout, layout_of
from onward.foreign.sources import Source
from onward.model import wholes
from onward.model.families.family import BUFFERS, WHOLES
from onward.model.shapes import parameter_shapes
from onward.model.workshop import Request, Settings, Workshop
from onward.weights.assemble import (
    AssemblyReport,
    Part,
    check_assignment,
    main_dtype,
    specs_of,
    write_model,
    write_report,
)
from onward.weights.pieces import Piece, Pieces, renamed

if TYPE_CHECKING:
    import torch

TEXT_TOWER = re.compile(r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_(?:scale|bias)$)")
IN_MEMORY = {"vision_tower": "model.vision_tower.", "projector": "model.multi_modal_projector."}
ON_DISK = {"vision_tower": "vision_tower.", "projector": "multi_modal_projector.", "language_model": "language_model."}
EMBEDDING = "model.embed_tokens.weight"


def assemble(request: Request, out: Path) -> AssemblyReport:
    """Write the model that the parts make up into `out`, which appears whole or not at all.

    InputError for a parameter that has not exactly one source, and for a tensor of a checkpoint that nothing uses.
    """
    require_new(out)
    if request.base:
        from onward.model.rebuilt import over_base

        return over_base(request, out)
    return _from_parts(request, out)


def _from_parts(request: Request, out: Path) -> AssemblyReport:
    family = request.family or "llava"
    if family not in wholes.CONFIGS:
        raise PlanError(
            f"--family {family}: models are put together from parts alone for {', '.join(wholes.CONFIGS)}",
            where="command line",
            hint="give a whole model in whose modules the parts fit: --base DIR",
        )
    if missing := [module for module in WHOLES if module not in request.modules]:
        raise PlanError(f"nothing is given for {', '.join(missing)}: add {missing[0]}=PATH", where="command line")
    shop = Workshop(request, Settings(request.settings))
    source, text, text_values, layout = _language_model(shop)
    vision, vision_values = _vision_tower(shop)
    parts = {"language_model": text, "vision_tower": vision, "projector": _projector(shop)}
    shop.check_all_used()
    config = wholes.CONFIGS[family](
        wholes.part_config(text_values, str(source.path / "config.json")),
        wholes.tower_config(vision_values, str(request.modules["vision_tower"] / "config.json")),
        shop.settings,
        bias="linear_1.bias" in parts["projector"],
    )
    token = shop.settings.get("image_token", wholes.IMAGE_TOKENS[family])
    images = request.modules["vision_tower"]
    if "image_processor" in request.settings:
        images = Path(shop.settings.get("image_processor", ""))
    aspect = shop.settings.get("image_aspect_ratio", wholes.AS_IT_IS)
    shop.settings.check_all_used()
    size = sum(spec.nbytes for spec in specs_of([Part(m, p) for m, p in parts.items()], request.dtype).values())
    require_space(out, size, "the assembled model")
    with committed_directory(out) as unfinished:
        if layout is None:
            wholes.copy_text_files(source.path, unfinished)
        else:
            layout.files(source.path, unfinished, source.config, text_values)
        config.image_token_id = wholes.add_image_token(unfinished, token)
        parts["language_model"] = _with_rows(text, config.text_config, config.image_token_id + 1, token)
        config.architectures = [f"{wholes.CLASSES[family]}ForConditionalGeneration"]
        expected = parameter_shapes(config.to_dict())
        parts["language_model"] = without_tied_head(
            parts["language_model"], expected, shop.left_out, str(source.path / "config.json")
        )
        check_assignment(expected, [Part(m, {in_memory(m, n): p for n, p in ps.items()}) for m, ps in parts.items()])
        wholes.write_image_files(family, images, unfinished, config, token, aspect)
        shop.settings.assumed["chat template"] = wholes.write_chat_template(unfinished, token)
        prefixes = _on_disk(config.vision_config.model_type)
        written = [Part(m, {_disk_name(prefixes[m], n): p for n, p in ps.items()}) for m, ps in parts.items()]
        config.dtype = main_dtype(specs_of(written, request.dtype).values())
        config.save_pretrained(unfinished)
        return finished(unfinished, shop, written)


def finished(unfinished: Path, shop: Workshop, parts: list[Part]) -> AssemblyReport:
    """Write the weights and the report of a directory in which all else lies already."""
    beside = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
    assigned, weights = write_model(unfinished, parts, specs_of(parts, shop.request.dtype))
    given = shop.request.settings
    report = AssemblyReport(
        tensors=assigned,
        stated={key: str(value) for key, value in shop.settings.stated.items() if key not in given},
        given={key: str(value) for key, value in given.items()},
        assumed={key: str(value) for key, value in shop.settings.assumed.items()},
        left_out=shop.left_out,
        files=(*weights, *(_record(path, unfinished) for path in beside)),
    )
    return write_report(unfinished, report)


def _language_model(shop: Workshop) -> tuple[Source, dict[str, Piece], dict[str, Any], Layout | None]:
    """Where it lies, its tensors by the names of a causal language model, its configuration in transformers' words, and
    the layout that both were converted from.
    """
    source = shop.open(shop.request.modules["language_model"], "language_model")
    if not source.config:
        raise InputError(
            "has no config.json: a language model is a model directory",
            where=str(source.path),
            hint="give the directory of its base, and what was trained over it as --adapter language_model=PATH",
        )
    values = dict(source.config)
    if llava.is_llava_config(values):
        shop.settings.stated |= llava.settings_of(values)
        values = llava.text_config(values)
    pieces = without_buffers(source.pieces("language_model"), shop.left_out)
    pieces = shop.trained(pieces, "language_model", source.path, lambda name: name)
    layout = layout_of(values)
    if layout is None:
        return source, pieces, values, None
    rules = layout.rules(values)
    return source, converted(pieces, rules, shop.left_out), layout.config(values, source.path).config, layout


def _vision_tower(shop: Workshop) -> tuple[dict[str, Piece], dict[str, Any]]:
    """Its tensors by their names in the tower, without `vision_model.`, and its configuration."""
    path = shop.request.modules["vision_tower"]
    source = shop.open(path, "vision_tower")
    values = dict(source.config)
    if isinstance(inner := values.get("vision_config"), dict):  # a whole CLIP or SigLIP
        values = {"model_type": f"{values.get('model_type')}_vision_model", **inner}
    if not values:
        raise InputError("has no config.json: a vision tower is a model directory", where=str(path))
    pieces = {}
    for name, piece in without_buffers(source.pieces("vision_tower"), shop.left_out).items():
        if text := TEXT_TOWER.match(name):
            shop.left_out[text[0].rstrip(".")] = f"of the text tower that {path} was trained with"
        else:
            pieces[name] = piece
    own_name = partial(re.sub, r"^vision_model\.", "")
    return shop.trained(renamed(pieces, own_name), "vision_tower", path, own_name), values


def _projector(shop: Workshop) -> dict[str, Piece]:
    """Its tensors by transformers' names. What its configuration states of the whole is noted."""
    path = shop.request.modules["projector"]
    source = shop.open(path, "projector")
    known = ("vision_feature_layer", "vision_feature_select_strategy", "downsample_ratio", "projector_hidden_act")
    shop.settings.stated |= {key: source.config[key] for key in known if key in source.config}
    if source.is_xtuner:  # it leaves the first patch out, whether the tower has a class token or not
        shop.settings.stated.setdefault("vision_feature_select_strategy", "default")
    if source.is_xtuner and isinstance(
        act := source.config.get("hidden_act"), str
    ):  # its word; LLaVA's is the decoder's
        shop.settings.stated["projector_hidden_act"] = act
    beside = path.parent / "config.json"
    if path.is_file() and beside.is_file() and llava.is_llava_config(values := read_json(beside)):
        shop.settings.stated |= llava.settings_of(values)
    pieces = source.pieces("projector")
    names = llava.projector_names(pieces, str(path))
    own = renamed(pieces, names.__getitem__)
    return shop.trained(own, "projector", path, lambda name: names.get(name, name))


def without_buffers(pieces: Pieces, left_out: dict[str, str]) -> dict[str, Piece]:
    """The parameters among tensors of older files."""
    left_out |= {name: "computed from the configuration" for name in pieces if re.search(BUFFERS, name)}
    return {name: piece for name, piece in pieces.items() if not re.search(BUFFERS, name)}


def _with_rows(text: Pieces, config: Any, needed: int, token: str) -> dict[str, Piece]:
    """The language model with as many rows as the image token needs: each new one is the mean of those that were there,
    so that the token's logit is the mean of all logits, and never the largest.
    """
    rows = config.vocab_size
    if needed <= rows:
        return dict(text)
    config.vocab_size = needed
    grown = dict(text)
    for name in (EMBEDDING, HEAD, "lm_head.bias"):
        if (piece := text.get(name)) and piece.shape[0] == rows:
            change = f"{piece.change} + {needed - rows} row of the mean, for {token}".strip()
            shape, read = (needed, *piece.shape[1:]), partial(_grown, piece, needed - rows)
            grown[name] = replace(piece, shape=shape, read=read, change=change)
    return grown


def _grown(piece: Piece, more: int) -> torch.Tensor:
    import torch

    value = piece.read()
    mean = value.float().mean(dim=0, keepdim=True).to(value.dtype)
    return torch.cat([value, *[mean] * more])


def in_memory(module: str, name: str) -> str:
    """The canonical name of a part's tensor."""
    if module == "language_model":
        return re.sub(r"^model\.", "model.language_model.", name)
    return f"model.{name}" if name == llava.NEWLINE else IN_MEMORY[module] + name


def _disk_name(prefix: str, name: str) -> str:
    return name if name == llava.NEWLINE else prefix + name


def _on_disk(vision_type: str) -> dict[str, str]:
    """Prefixes of the names that released models have in their files, which older transformers and other tools read."""
    inner = "vision_model." if vision_type in ("clip_vision_model", "siglip_vision_model") else ""
    return {**ON_DISK, "vision_tower": ON_DISK["vision_tower"] + inner}


def _record(path: Path, directory: Path) -> FileRecord:
    return FileRecord(path.relative_to(directory).as_posix(), path.stat().st_size, digest_file(path, "xxh3"))
