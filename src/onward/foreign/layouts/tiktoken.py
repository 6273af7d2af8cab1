"""`qwen.tiktoken` → tokenizer.json: byte-level BPE with Qwen's pattern over NFC text.

Equal ids except inside `<img>…</img>`, where Qwen-VL's own tokenizer writes a path's byte values; a picture's
embeddings take their place, so which ids stand there does not matter.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from onward.errors import DamageError, InputError
from onward.files import read_json
from onward.foreign.layouts.layout import present
from onward.foreign.layouts.sidecars import added_token, write_tokenizer

FILE = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
IMAGE_SPECIAL = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML as Qwen's own `chat` and finetune.py write it."""


def convert_tokenizer(
    source: Path, out: Path, *, chat_template: str, special: tuple[str, ...] = SPECIAL
) -> tuple[dict[str, int], list[str]]:
    """Write tokenizer.json, tokenizer_config.json and the chat template; the ids of the special tokens, and notes.

    They follow the ranks, as in every published version. DamageError for a file that is not base64 and rank by line.
    """
    ranks = _ranks(source / FILE)
    letters = _letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = _merges(ranks, names)
    ids = {token: len(ranks) + n for n, token in enumerate(special)}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    steps = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, plain]},
        "post_processor": None,
        "decoder": plain,
    }
    bpe = {
        "ignore_merges": True,  # as tiktoken: a word that is a token is taken whole
        "vocab": {names[token]: rank for token, rank in ranks.items()},
        "merges": merges,
    }
    given = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    config = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(special[1:]),
        **present(given, "model_max_length"),
    }
    write_tokenizer(out, {number: added_token(token) for token, number in ids.items()}, steps, bpe, config)
    (out / "chat_template.jinja").write_text(chat_template)
    alone = {name for name in names.values() if len(name) > 1} - {a + b for a, b in merges}
    note = f"{len(alone)} tokens are made by no two others: tokenizer.json finds them, transformers' Qwen2Tokenizer not"
    return ids, [note] if alone else []


def _ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"has no {FILE}: the tokenizer is part of the model", where=str(path.parent)) from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DamageError("is not a token in base64 and its rank", where=f"{path}:{number}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DamageError("its ranks are not 0, 1, 2, …, each once", where=str(path))
    return ranks


def _letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _merges(ranks: Mapping[bytes, int], names: Mapping[bytes, str]) -> list[list[str]]:
    """tiktoken joins whatever two neighbours make the token of lowest rank: every way to make it, in that order."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [[names[a], names[b]] for _, _, a, b in sorted(known)]
    return merges
