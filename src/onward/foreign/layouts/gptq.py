"""4-bit weights as GPTQ packs them (AutoGPTQ, also 2 and 8 bits), unpacked exactly.

Of a layer [out, in]: `qweight` int32 [in / n, out] holds n = 32 / bits values an integer, lowest bits first, along the
input; `qzeros` int32 [groups, out / n] likewise along the output, each a zero point minus 1, the largest for 0 (in
format gptq_v2 the zero point itself); `scales` [groups, out]; `g_idx` int32 [in] names each input's group. The weight
is `scales[g_idx] * (q - zero)`, a product of an 11-bit and a small number, which fp32 holds exactly and fp16 does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.errors import InputError
from onward.files import read_json
from onward.weights.pieces import Piece, Pieces

if TYPE_CHECKING:
    import torch

PACKED = ("qweight", "qzeros", "scales", "g_idx")


def unpacked(tensors: Pieces, config: Mapping[str, Any], source: Path) -> tuple[dict[str, Piece], list[str]]:
    """The tensors with a `weight` in fp32 in the place of every packed layer, and what the report should say of it.

    InputError for quantisation other than GPTQ's, or a layer of which a part is missing or has another shape.
    """
    packed = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    quantisation = config.get("quantization_config")
    if quantisation is None and (source / "quantize_config.json").is_file():
        quantisation = {"quant_method": "gptq", **read_json(source / "quantize_config.json")}
    if quantisation is None and not packed:
        return dict(tensors), []
    given = quantisation if isinstance(quantisation, dict) else {}
    where = str(source / "config.json")
    bits = given.get("bits")
    if given.get("quant_method", "gptq") != "gptq" or bits not in (2, 4, 8):
        raise InputError(f"quantisation {quantisation!r} is not unpacked: only GPTQ's, of 2, 4 or 8 bits", where=where)
    offset = 0 if given.get("checkpoint_format") == "gptq_v2" else 1
    found: dict[str, Piece] = {}
    for name, piece in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            found[f"{layer}.weight"] = _weight(layer, tensors, bits, offset)
        elif part not in PACKED or layer not in packed:
            found[name] = piece
    return found, [f"{len(packed)} layers of {bits} bits (GPTQ) are unpacked to fp32, which holds their values exactly"]


def _weight(layer: str, tensors: Pieces, bits: int, offset: int) -> Piece:
    parts = {part: tensors.get(f"{layer}.{part}") for part in PACKED}
    qweight, qzeros, scales, g_idx = parts.values()
    assert qweight is not None
    if qzeros is None or scales is None:
        raise InputError("is packed, but its qzeros or scales are missing", where=f"{qweight.origin}, layer {layer}")
    values = 32 // bits
    rows, columns = qweight.shape[0] * values, qweight.shape[-1]
    groups = scales.shape[0]
    shapes = {"qzeros": (groups, columns // values), "scales": (groups, columns), "g_idx": (rows,)}
    for part, shape in shapes.items():
        piece = parts[part]
        if piece is not None and piece.shape != shape:
            raise InputError(f"is {piece.shape}, not {shape}", where=f"{piece.origin}, tensor {layer}.{part}")
    if g_idx is None and rows % groups:
        raise InputError(f"{rows} inputs are not {groups} groups", where=f"{qweight.origin}, layer {layer}")
    read = partial(_unpack, qweight, qzeros, scales, g_idx, bits, offset)
    return replace(qweight, dtype="F32", shape=(columns, rows), read=read)


def _unpack(qweight: Piece, qzeros: Piece, scales: Piece, g_idx: Piece | None, bits: int, offset: int) -> torch.Tensor:
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    packed, zeros, scale = qweight.read(), qzeros.read(), scales.read().float()
    weight = ((packed[:, None, :] >> shifts[None, :, None]) & mask).reshape(-1, packed.shape[1])
    zero = ((zeros[:, :, None] >> shifts[None, None, :]) + offset & mask).reshape(zeros.shape[0], -1)
    inputs, groups = weight.shape[0], scale.shape[0]
    group = g_idx.read().long() if g_idx else torch.arange(inputs) // (inputs // groups)
    if int(group.min()) < 0 or int(group.max()) >= groups:
        raise InputError(f"names a group beyond {groups}", where=f"{qweight.origin}, a layer's g_idx")
    return (scale[group] * (weight - zero[group])).t().contiguous()
