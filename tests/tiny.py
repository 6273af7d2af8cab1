"""Tiny models with dropout, and data for them, built offline from configurations: what the tests train."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "what colour is the picture ? red green blue yellow",
    "say it again please : one two three four five six seven eight nine ten",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    """A byte-level BPE tokenizer of some 300 tokens with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML,
        additional_special_tokens=["<image>"], extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def text_model(
    directory: Path, kind: str = "qwen2", *, tied: bool = False, dtype: str = "float32", seed: int = 0
) -> Path:
    """A decoder of some 60 thousand parameters, attention dropout 0.1: llama, qwen2, qwen3, mistral or internlm3."""
    import torch
    import transformers

    words = tokenizer()
    size = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": tied, "attention_dropout": 0.1, "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    if kind in ("llama", "qwen3"):
        size["head_dim"] = 8
    config = {
        "llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig, "internlm3": transformers.InternLM3Config,
    }[kind]  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(**size)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def llava(directory: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """A LLaVA of some 90 thousand parameters on 28 x 28 images, attention dropout 0.1 in both towers."""
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer()
    text = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, attention_dropout=0.1,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        attention_dropout=0.1,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(directory)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    transformers.LlavaProcessor(
        image_processor=images, tokenizer=words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHATML,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def text_data(path: Path, rows: int = 22, seed: int = 0) -> Path:
    """Conversations of one or two turns, of unequal lengths."""
    chance = random.Random(seed)
    words = CORPUS[2].split()[-10:]
    with path.open("w") as file:
        for _ in range(rows):
            said = [" ".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(chance.randint(1, 2))]
            messages = []
            for text in said:
                messages += [
                    {"role": "user", "content": f"say it again please : {text}"},
                    {"role": "assistant", "content": text},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def colour_data(path: Path, rows: int = 22, seed: int = 0) -> Path:
    """Small images of one colour with some noise, and the question which; images lie beside the file."""
    from PIL import Image

    chance = random.Random(seed)
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number in range(rows):
            name, colour = chance.choice(list(COLOURS.items()))
            image = Image.new("RGB", (28, 28))
            image.putdata(
                [tuple(max(0, min(255, c + chance.randint(-20, 20))) for c in colour) for _ in range(28 * 28)]
            )
            image.save(path.parent / "images" / f"{path.stem}-{number}.png")
            parts = [
                {"type": "image", "path": f"images/{path.stem}-{number}.png"},
                {"type": "text", "text": "what colour is the picture ?"},
            ]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": name}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
