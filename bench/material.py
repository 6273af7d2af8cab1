"""What every contender trains: a small Llama with its tokenizer, real text, and onward's plan.

model/            Llama, random weights, ChatML template; its shape and its vocabulary as the setting says
setting.json      the setting
train.jsonl       functions of Python's standard library → the first line of their docstrings
plan.yaml         what onward is given
steps.json        [step][sample] → [token ids, labels], in the order in which onward takes them
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
LOSS_ON = ("assistant", "all")
SHAPES = {
    "5M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "30M": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6,
        "num_key_value_heads": 6, "tie_word_embeddings": True,
    },
    "135M": {  # SmolLM2-135M's
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
}  # fmt: skip
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
SEED = 42
STAGE = "sft"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders. `shape` is one of SHAPES, `max_length` and `vocabulary` in tokens."""

    batch_size: int = 16
    micro_batch_size: int = 8
    max_length: int = 256
    vocabulary: int = 4096
    shape: str = "5M"


def setting_of(folder: Path) -> Setting:
    """The setting of material that was built."""
    return Setting(**json.loads((folder / "setting.json").read_text()))


def build(folder: Path, *, steps: int, threads: int, setting: Setting) -> None:
    """Write the material for `steps` optimizer steps into `folder`, one plan and one order for each way of loss_on."""
    rows = _rows(steps * setting.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "setting.json").write_text(json.dumps(asdict(setting)))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _write_model(folder / "model", [message["content"] for row in rows for message in row["messages"]], setting)
    for loss_on in LOSS_ON:
        (folder / loss_on).mkdir(exist_ok=True)
        (folder / loss_on / "plan.yaml").write_text(json.dumps(_plan(loss_on, steps, threads, setting), indent=2))
        (folder / loss_on / "steps.json").write_text(json.dumps(_steps(folder, loss_on, steps, setting)))


def _rows(count: int) -> list[dict[str, Any]]:
    """The first `count` conversations of the docstrings example."""
    sys.path.insert(0, str(BENCH.parent / "examples" / "docstrings"))
    import sysconfig

    from prepare import described_functions, sample  # type: ignore[import-not-found]

    functions = described_functions(Path(sysconfig.get_path("stdlib")))
    rows = [sample(source, sentence) for _, source, sentence in islice(functions, count)]
    if len(rows) < count:
        raise SystemExit(f"the standard library gives {len(rows)} samples, {count} are needed: take fewer --steps")
    return rows


def _write_model(out: Path, texts: list[str], setting: Setting) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=setting.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    config = LlamaConfig(
        **SHAPES[setting.shape], vocab_size=setting.vocabulary, max_position_embeddings=2 * setting.max_length,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _plan(loss_on: str, steps: int, threads: int, setting: Setting) -> dict[str, Any]:
    stage = {
        "name": STAGE,
        "train": {"language_model": {"mode": "full"}},
        "data": {"path": "../train.jsonl"},
        "steps": steps,
        "batch_size": setting.batch_size,
        "micro_batch_size": setting.micro_batch_size,
        "sort_by_length": False,  # the same micro-batches for all; bench/throughput.py compares with it
        "max_length": setting.max_length,
        "overlong": "truncate",
        "loss_on": loss_on,
        "learning_rate": LEARNING_RATE,
        "optimizer": {"weight_decay": WEIGHT_DECAY},
        "max_grad_norm": MAX_GRAD_NORM,
        "schedule": {"name": "constant"},
    }
    return {
        "model": "../model",
        "seed": SEED,
        "engine": {"threads": threads},
        "checkpoint": {"every": steps},
        "stages": [stage],
    }


def prepared(folder: Path, loss_on: str) -> tuple[Any, Any]:
    """The data and its encoder, as onward has them."""
    from onward.data.encode import load_encoder
    from onward.data.prepare import ResolvedSource, prepare

    length = setting_of(folder).max_length
    encoder = load_encoder(
        folder / "model", max_length=length, overlong="truncate", loss_on=loss_on, date="2026-01-01"
    )  # fmt: skip
    return prepare([ResolvedSource(folder / "train.jsonl")], encoder, on_bad_sample="stop"), encoder


def batches(data: Any, encoder: Any, steps: int, **how: Any) -> Any:
    """The batches of the plan's steps; `how`: batch_size, micro_batch_size, layout."""
    from onward.data.batches import step_batches

    return step_batches(data, encoder, seed=SEED, stage=STAGE, first_step=1, last_step=steps, workers=0, **how)


def _steps(folder: Path, loss_on: str, steps: int, setting: Setting) -> list[list[tuple[list[int], list[int]]]]:
    """The samples of each step, as onward orders and encodes them."""
    found = batches(*prepared(folder, loss_on), steps, batch_size=setting.batch_size, micro_batch_size=1)
    return [[(m["input_ids"][0].tolist(), m["labels"][0].tolist()) for m in b.micro_batches] for b in found]
