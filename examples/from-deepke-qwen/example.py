"""A Qwen with LoRA that Hugging Face's Trainer was training for DeepKE-style extraction: its training goes on, exactly.

    python examples/from-deepke-qwen/example.py [CHECKPOINT BASE]

First a small native Qwen2 is trained by Trainer to step 20 of 60, as DeepKE's scripts do, and onward goes on from its
checkpoint: moments, step count and learning rates are the source's. Then CHECKPOINT, a Trainer checkpoint over BASE, a
first-generation Qwen with adapters on fused layers, goes on as well: the base is converted, and q, k and v keep sharing
one A. Without arguments: the samples beside the repository, if there.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SAMPLES = HERE.parents[2] / "shared" / "samples"
OUT = Path("demo/from-deepke-qwen")
PEOPLE, PLACES = ["Ada", "Wei", "Noor", "Ivo"], ["Oslo", "Suzhou", "Cairo", "Riga"]
INSTRUCTION = "Extract the relation as a triple."
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(
    checkpoint: Path = SAMPLES / "qwen-7b-lora-ckpt" / "checkpoint-6",
    base: Path = SAMPLES / "qwen-7b-tiny",
    out: Path = OUT,
) -> None:
    out = out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "data").mkdir(parents=True)
    for plan in HERE.glob("*.yaml"):
        shutil.copyfile(plan, out / plan.name)
    rows = {
        side: make_rows(out / "data" / f"{side}.json", count, side) for side, count in (("train", 64), ("heldout", 16))
    }

    print("1. Trainer trains a LoRA, and is stopped at step 20 of 60")
    train_with_trainer(out, rows["train"])
    print("\n2. What is there, and can it go on?")
    onward(out, "inspect", "trainer/checkpoint-20")
    print("\n3. It goes on: the same moments, the same learning rates; the order of the data is onward's own, and said")
    onward(out, "import", "trainer/checkpoint-20", "--plan", "plan.yaml", "--run", "run", "--accept", "data_order")
    onward(out, "run", "plan.yaml", "--run", "run")
    print("\n4. And out: what the stage handed on is a whole model, merged")
    onward(out, "export", "run/stages/1-extract/output", "--to", "huggingface", "--out", "final")

    if not (checkpoint.is_dir() and base.is_dir()):
        print(f"\n{checkpoint} is not there: a first-generation Qwen is not taken")
        return
    print("\n5. A first-generation Qwen, with adapters on fused layers: its training goes on too")
    onward(out, "inspect", checkpoint.resolve())
    onward(out, "import", base.resolve(), "--out", "qwen")
    accepted = ("--accept", "loss", "--accept", "data_order")
    onward(out, "import", checkpoint.resolve(), "--plan", "fused.yaml", "--run", "run-fused", *accepted)
    onward(out, "run", "fused.yaml", "--run", "run-fused")


def onward(where: Path, *words: object) -> None:
    """One command, shown with what it says."""
    print(f"   $ onward {shlex.join(map(str, words))}", flush=True)
    command = [sys.executable, "-m", "onward", *map(str, words)]
    done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, text=True)
    print("".join(f"   {line}\n" for line in done.stdout.splitlines()), end="")
    if done.returncode:
        sys.exit(done.returncode)


def make_rows(path: Path, count: int, seed: str) -> list[dict[str, str]]:
    """Instructions as DeepKE has them: instruction, input, output."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        who, where = chance.choice(PEOPLE), chance.choice(PLACES)
        answer = f"({who}, lives in, {where})"
        rows.append({"instruction": INSTRUCTION, "input": f"{who} has lived in {where} for years.", "output": answer})
    path.write_text(json.dumps(rows, indent=1))
    return rows


def make_model(directory: Path) -> Any:
    """A Qwen2 of random weights, with a byte-level tokenizer, and its tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([INSTRUCTION], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, eos_token_id=2,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def train_with_trainer(out: Path, rows: list[dict[str, str]]) -> None:
    """20 of 60 steps, with what plan.yaml says; the checkpoint is what Trainer leaves."""
    import peft
    import torch
    import transformers

    tokenizer = make_model(out / "model")
    torch.manual_seed(1)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32),
        peft.LoraConfig(
            r=8, lora_alpha=16, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
        ),
    )  # fmt: skip

    class StopAt20(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= 20

    arguments = transformers.TrainingArguments(
        output_dir=str(out / "trainer"), per_device_train_batch_size=8, max_steps=60, learning_rate=1e-2,
        lr_scheduler_type="cosine", warmup_steps=6, weight_decay=0.0, logging_steps=1, save_steps=20, report_to=[],
        use_cpu=True, disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    samples = [encode(tokenizer, row) for row in rows]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=samples, callbacks=[StopAt20()],
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
    )  # fmt: skip
    trainer.train()


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Tokens, of which the answer is learnt."""
    asked = [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    begin = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{row['output']}<|im_end|>", add_special_tokens=False)["input_ids"]
    return {"input_ids": begin + answer, "labels": [-100] * len(begin) + answer}


def collate(batch: list[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    import torch

    length = max(len(sample["input_ids"]) for sample in batch)

    def padded(key: str, value: int) -> Any:
        return torch.tensor([sample[key] + [value] * (length - len(sample[key])) for sample in batch])

    ids = padded("input_ids", pad)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != pad).long()}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
