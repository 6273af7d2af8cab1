"""What the tests of data build: tokenizers, rows, pictures."""

import json
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>",
]  # fmt: skip
CORPUS = ["the quick brown fox jumps over the lazy dog", "what colour is the picture ? red green blue yellow"] * 20


def build_tokenizer(chat_template: str | None, kind: str = "bytes", bos: str = "<s>", eos: str = "<|im_end|>"):
    if kind == "bytes":  # as GPT-2, Llama 3, Qwen
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as SentencePiece in Llama 2: spaces become ▁, what is unknown falls back to bytes
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ▁.:?[]/<>"]
    special = SPECIAL if kind == "bytes" else ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
        chat_template=chat_template,
    )


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(question: str, answer: str, **answer_keys):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **answer_keys}]
    }


def are_tokens_of(tokens, encoded) -> bool:
    """Are these ids, and which are learnt, those of the sample?"""
    return all(
        ours.dtype == its.dtype and ours.tolist() == its.tolist()
        for ours, its in zip(tokens, (encoded.input_ids, encoded.trained), strict=True)
    )


def paint(path: Path, colour: str, size=(40, 30), **options) -> Path:
    Image.new("RGB", size, colour).save(path, **options)
    return path
