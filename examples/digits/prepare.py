"""Build what the digits demo trains: real images, questions about them, and a small LLaVA with random weights.

    python examples/digits/prepare.py demo/digits

The images are the UCI handwritten digits that scikit-learn carries (1797 pictures of 8 x 8 pixels). Everything is made
from configurations and a seed: nothing is downloaded, and two calls give the same files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 7
PIXELS = 32
PATCH = 16
SPREAD = 0.06  # of the random weights: three times the usual, for a model this narrow learns faster from it
HELD_OUT = 0.2
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


def ask_digit(digit: int) -> tuple[str, str]:
    """What stage `learn` teaches: read the digit."""
    return "Which digit is this?", WORDS[digit]


def ask_rest(digit: int) -> tuple[str, str]:
    """What stage `adapt` teaches on top: reckon with it. The answers are words that the model knows by then."""
    return "What is nine minus this digit?", WORDS[9 - digit]


def write_data(out: Path) -> None:
    """Images as PNG files, and one JSON lines file for each question and each side of the split."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = out / "images"
    images.mkdir(parents=True)
    for index, pixels in enumerate(digits.images):
        picture = Image.fromarray((pixels / 16 * 255).astype("uint8")).resize(
            (PIXELS, PIXELS), Image.Resampling.BICUBIC
        )
        picture.convert("RGB").save(images / f"{index:04d}.png")
    train, heldout = train_test_split(
        range(len(digits.target)), test_size=HELD_OUT, stratify=digits.target, random_state=SEED
    )
    for question, ask in (("digit", ask_digit), ("rest", ask_rest)):
        for side, indices in (("train", train), ("heldout", heldout)):
            rows = [sample(f"images/{index:04d}.png", int(digits.target[index]), ask) for index in indices]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / f"{question}-{side}.jsonl").write_text(text, encoding="utf-8")


def sample(image: str, digit: int, ask: Callable[[int], tuple[str, str]]) -> dict[str, Any]:
    """One conversation about one image, in the `messages` form."""
    question, answer = ask(digit)
    user = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def write_model(out: Path) -> None:
    """A LLaVA of 3.1 million random parameters with its own tokenizer and processor, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "user assistant system",
        *(text for digit in range(10) for ask in (ask_digit, ask_rest) for text in ask(digit)),
    ]
    bpe.train_from_iterator(corpus * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<image>"]
    )
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=PIXELS,
        patch_size=PATCH, attention_dropout=0.05, initializer_range=SPREAD,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attention_dropout=0.05, initializer_range=SPREAD,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-1,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), initializer_range=SPREAD,
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)


def prepare(out: Path) -> None:
    """Write plan, data and model into `out`, which must not hold them yet. Takes seconds."""
    out.mkdir(parents=True, exist_ok=True)
    write_data(out / "data")
    write_model(out / "model")
    shutil.copy(Path(__file__).parent / "plan.yaml", out / "plan.yaml")


if __name__ == "__main__":
    prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/digits"))
