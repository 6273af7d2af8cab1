"""`tokenizer.model` of sentencepiece (BPE with byte fallback, as InternLM2, Llama and Phi-3 have it) → tokenizer.json.

`tokenizer_config.json` lays names over the pieces `[UNUSED_TOKEN_n]` and adds tokens after the vocabulary; the original
tokenizer puts `<s>` in front. Where its vocabulary wants a space before a text, each text between added tokens gets
one; a Llama's tokenizer that says `legacy: false` puts one before the first alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.errors import DamageError, InputError
from onward.files import read_json
from onward.foreign.layouts.sidecars import added_token, stated_template, write_tokenizer

FILE = "tokenizer.model"
SPACE = "▁"
BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KEPT = ("model_max_length", "bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""InternLM2's own, for directories that hold none."""


def convert_tokenizer(source: Path, out: Path) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and the chat template; what the report should say of them.

    InputError for a sentencepiece model of another kind than BPE, or with another normaliser than none.
    """
    model = _read(source / FILE)
    given = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    pieces = [piece.piece for piece in model.pieces]
    added = _added(source, given, model)
    for number, token in added.items():
        if number < len(pieces):
            pieces[number] = token["content"]
        elif number != len(pieces) + sum(other >= len(pieces) for other in added if other < number):
            raise InputError(f"added token {token['content']} has id {number}, with a gap before it", where=str(source))
    ids = {piece: number for number, piece in enumerate(pieces)} | {t["content"]: n for n, t in added.items()}
    unknown = next((piece.piece for piece in model.pieces if piece.type == UNKNOWN), None)
    prefix, words, notes = bool(model.normalizer_spec.add_dummy_prefix), None, []
    if given.get("legacy") is False:
        prefix = bool(given.get("add_prefix_space", True))
        scheme = "first" if prefix else "never"
        words = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        notes = ["a text that begins with a space gets no second one in front, as its own tokenizer would give it"]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": _normalizers(model.normalizer_spec, prefix=prefix and not words),
        },
        "pre_tokenizer": words,
        "post_processor": _around(given, ids, source),
        "decoder": {"type": "Sequence", "decoders": [*decoders, *([strip] if prefix else [])]},
    }
    bpe = {
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": bool(model.trainer_spec.byte_fallback),
        "vocab": {piece: number for number, piece in enumerate(pieces)},
        "merges": _merges(model),
    }
    config = {key: given[key] for key in KEPT if given.get(key) is not None}
    write_tokenizer(out, added, steps, bpe, {**({"unk_token": unknown} if unknown else {}), **config})
    template = stated_template(source, given) or (TEMPLATE if "<|im_start|>" in ids else None)
    if not template:
        return [*notes, "it has no chat template, and no tokens of InternLM2's own: put one into chat_template.jinja"]
    (out / "chat_template.jinja").write_text(template)
    return notes


def _read(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(
            "is read with the sentencepiece and protobuf packages, which are not installed",
            where=str(path),
            hint="pip install 'onward[import]'",
        ) from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"has no {FILE}: the tokenizer is part of the model", where=str(path.parent)) from None
    except Exception as error:  # protobuf's DecodeError, which lives in other places from version to version
        raise DamageError(f"is no sentencepiece model ({error})", where=str(path)) from None
    if model.trainer_spec.model_type != BPE:
        raise InputError("is a sentencepiece model of another kind than BPE", where=str(path))
    spec = model.normalizer_spec
    if spec.precompiled_charsmap or not spec.escape_whitespaces or model.trainer_spec.treat_whitespace_as_suffix:
        raise InputError(f"normalises text as {spec.name or 'a map of its own'}: not converted", where=str(path))
    if not model.pieces:
        raise DamageError("holds no pieces", where=str(path))
    return model


def _added(source: Path, given: Mapping[str, Any], model: Any) -> dict[int, dict[str, Any]]:
    """Tokens that are found in a text before it is cut into pieces, by id."""
    added = {
        number: added_token(piece.piece, special=piece.type != USER_DEFINED)
        for number, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    listed = read_json(source / "added_tokens.json") if (source / "added_tokens.json").is_file() else {}
    special = {str(token) for token in given.get("additional_special_tokens") or ()}
    added |= {number: added_token(token, special=token in special) for token, number in listed.items()}
    for number, token in (given.get("added_tokens_decoder") or {}).items():
        added[int(number)] = added_token(token["content"], special=bool(token.get("special")), given=token)
    return dict(sorted(added.items()))


def _normalizers(spec: Any, *, prefix: bool) -> list[dict[str, Any]]:
    def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    extra = [
        replace({"Regex": r"\A +| +\z"}, ""),
        replace({"Regex": r" {2,}"}, " "),
    ]
    return [
        *(extra if spec.remove_extra_whitespaces else []),
        *([{"type": "Prepend", "prepend": SPACE}] if prefix else []),
        replace({"String": " "}, SPACE),
    ]


def _around(given: Mapping[str, Any], ids: Mapping[str, int], source: Path) -> dict[str, Any] | None:
    """`<s>` before a text, `</s>` after it, as the tokenizer's configuration says (by default: before)."""
    before = [_token(given, "bos_token", "<s>")] if given.get("add_bos_token", True) else []
    after = [_token(given, "eos_token", "</s>")] if given.get("add_eos_token", False) else []
    for token in (*before, *after):
        if token not in ids:
            raise InputError(f"its {token} is no token of its vocabulary", where=str(source / "tokenizer_config.json"))
    if not before and not after:
        return None

    def single(kind: str, sequence: int) -> list[dict[str, Any]]:
        def special(token: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": token, "type_id": sequence}}

        text = {"Sequence": {"id": kind, "type_id": sequence}}
        return [*map(special, before), text, *map(special, after)]

    return {
        "type": "TemplateProcessing",
        "single": single("A", 0),
        "pair": [*single("A", 0), *single("B", 1)],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*before, *after)},
    }


def _token(given: Mapping[str, Any], key: str, default: str) -> str:
    value = given.get(key) or default
    return str(value["content"] if isinstance(value, dict) else value)


def _merges(model: Any) -> list[list[str]]:
    """sentencepiece joins whatever two neighbours make the piece of highest score: every way to make it, so ordered."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):  # a stable sort: equal scores by id
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [[a, b] for a, b in pairs if a in scores and b in scores]
    return merges
