"""What lies beside the weights of a converted model, as far as layouts share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.files import read_json, write_json

GENERATION = (
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "max_new_tokens",
    "max_length", "repetition_penalty", "num_beams",
)  # fmt: skip
"""Keys of generation_config.json that mean the same everywhere."""


def write_generation_config(source: Path, out: Path, ends: tuple[int, ...] = ()) -> None:
    """generation_config.json as the source has it, without keys of its own code. `ends`: tokens that end an answer."""
    path = source / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    config = {key: given[key] for key in GENERATION if given.get(key) is not None}
    if ends:
        config["eos_token_id"] = list(ends)
    if config:
        write_json(out / "generation_config.json", config)


def added_token(content: str, *, special: bool = True, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One entry of tokenizer.json's `added_tokens`, without its id."""
    flags = {key: bool((given or {}).get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
    return {"content": content, **flags, "special": special}


def write_tokenizer(
    out: Path,
    added: Mapping[int, Mapping[str, Any]],
    steps: Mapping[str, Any],
    model: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """tokenizer.json of a BPE `model` with the `steps` around it (normalizer, pre_tokenizer, post_processor, decoder),
    and tokenizer_config.json. `added`: tokens that are found in a text before it is cut, by id.
    """
    plain = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, **steps, "model": {**plain, **model}}
    listed = [{"id": number, **token} for number, token in added.items()]
    write_json(out / "tokenizer.json", {**whole, "added_tokens": listed})
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    decoder = {str(number): token for number, token in added.items()}
    write_json(out / "tokenizer_config.json", {**named, "added_tokens_decoder": decoder, **config})


def token_ids(source: Path) -> dict[str, int]:
    """Ids of the tokens that a directory's tokenizer files add to its vocabulary, or name in it."""
    ids: dict[str, int] = {}
    if (source / "tokenizer.json").is_file():
        ids |= {token["content"]: token["id"] for token in read_json(source / "tokenizer.json").get("added_tokens", ())}
    if (source / "added_tokens.json").is_file():
        ids |= read_json(source / "added_tokens.json")
    if (source / "tokenizer_config.json").is_file():
        named = read_json(source / "tokenizer_config.json").get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(number) for number, token in named.items()}
    return ids


def with_images(template: str, image: str) -> str:
    """A chat template of texts made to take contents that are lists of parts. `image`: the expression that is written
    for an image, `flat.pictures` counts them.
    """
    return (
        "{%- set flat = namespace(messages=[], text='', pictures=0) -%}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is string -%}{%- set flat.messages = flat.messages + [message] -%}{%- else -%}"
        "{%- set flat.text = '' -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}"
        "{%- set flat.pictures = flat.pictures + 1 -%}{%- set flat.text = flat.text + " + image + " -%}"
        "{%- else -%}{%- set flat.text = flat.text + part['text'] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set messages = flat.messages -%}" + template
    )


def stated_template(source: Path, given: Mapping[str, Any]) -> str | None:
    """The chat template of a directory: in a file of its own, or in its tokenizer_config.json (`given`)."""
    if (source / "chat_template.jinja").is_file():
        return (source / "chat_template.jinja").read_text()
    template = given.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((item["template"] for item in template if item["name"] == "default"), None)
    return template or None


def convert_text_tokenizer(source: Path, out: Path) -> list[str]:
    """A language model's tokenizer as tokenizer.json, and notes: from tokenizer.model where there is one, whatever the
    class that a configuration names makes of it; else from its tokenizer.json, or as transformers reads its files.

    InputError where there is none that can be read.
    """
    if (source / "tokenizer.model").is_file():
        from onward.foreign.layouts.sentencepiece import convert_tokenizer

        return convert_tokenizer(source, out)
    import transformers

    whole = (source / "tokenizer.json").is_file()
    if not whole and not (source / "vocab.json").is_file():
        raise InputError("has no tokenizer.model, tokenizer.json or vocab.json", where=str(source))
    kind = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds for a missing or foreign file
        raise InputError(f"its tokenizer cannot be loaded ({error})", where=str(source)) from error
    tokenizer.save_pretrained(out)
    if whole:  # a class of that name builds its own normaliser from the vocabulary
        config = read_json(out / "tokenizer_config.json")
        write_json(out / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    return [] if tokenizer.chat_template else ["it has no chat template: put one into chat_template.jinja"]
