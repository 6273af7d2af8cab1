"""Pieces of a LLaVA as XTuner and LLaVA write them, made of random weights, and the logits that they should give.

The expected model is put together by hand: formula for LoRA in float64, state dicts by transformers' own names.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

HIDDEN, WIDE = 32, 48  # of the vision tower, of the language model


@dataclass
class Made:
    """Where the pieces lie, and the tensors that they stand for: language model, tower, projector by own names."""

    root: Path
    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    projector: dict = field(default_factory=dict)
    text_config: object = None
    vision_config: object = None
    lora: dict = field(default_factory=dict)


def draw(generator, *shape, dtype=torch.float32, scale=0.2):
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def lora_of(weights: dict, layers: list[str], ranks: list[int], generator, dtype=torch.float32) -> dict:
    """(A, B) of each layer, ranks in turn."""
    pairs = {}
    for number, layer in enumerate(layers):
        rank, (rows, columns) = ranks[number % len(ranks)], weights[f"{layer}.weight"].shape
        pairs[layer] = (draw(generator, rank, columns, dtype=dtype), draw(generator, rows, rank, dtype=dtype))
    return pairs


def add(weights: dict, pairs: dict, alpha: float, rslora: bool) -> dict:
    merged = dict(weights)
    for layer, (a, b) in pairs.items():
        scale = alpha / math.sqrt(len(a)) if rslora else alpha / len(a)
        merged[f"{layer}.weight"] = (weights[f"{layer}.weight"].double() + scale * b.double() @ a.double()).float()
    return merged


def write(file: Path, tensors: dict, *, pickled: bool) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if pickled:
        torch.save(tensors, file)
    else:
        save_file(tensors, file, {"format": "pt"})


def write_adapter(directory: Path, pairs: dict, alpha: float, *, rslora=False, pickled=False, base="") -> None:
    ranks = {layer: len(a) for layer, (a, _) in pairs.items()}
    rank = next(iter(ranks.values()))
    tensors = {
        f"base_model.model.{layer}.lora_{ab}.weight": t
        for layer, p in pairs.items()
        for ab, t in zip("AB", p, strict=True)
    }
    write(directory / f"adapter_model.{'bin' if pickled else 'safetensors'}", tensors, pickled=pickled)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "bias": "none",
        "rank_pattern": {layer: other for layer, other in ranks.items() if other != rank},
        "base_model_name_or_path": base, "target_modules": sorted({layer.rsplit(".")[-1] for layer in pairs}),
        "megatron_core": "megatron.core", "init_lora_weights": True, "use_dora": False,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))


def vision_tower(directory: Path, *, kind="clip", layers=3, image=56, pickled=False, whole=False, generator=None):
    """A CLIP or SigLIP tower in files named as released ones are; `whole`: with the text tower beside. Gives tensors by
    the names that the tower has without `vision_model.`, and its configuration.
    """
    import transformers

    size = {
        "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2,
        "image_size": image, "patch_size": 14,
    }  # fmt: skip
    config = (transformers.CLIPVisionConfig if kind == "clip" else transformers.SiglipVisionConfig)(**size)
    model = (transformers.CLIPVisionModel if kind == "clip" else transformers.SiglipVisionModel)(config)
    tensors = {name: draw(generator, *p.shape) for name, p in model.named_parameters()}
    named = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    values = {**size, "model_type": f"{kind}_vision_model"}
    if whole:
        named |= {
            "text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.tensor(1.0),
            "visual_projection.weight": torch.ones(8, HIDDEN), "text_projection.weight": torch.ones(8, 8),
            "vision_model.embeddings.position_ids": torch.arange(17)[None],
        }  # fmt: skip
        values = {"model_type": kind, "vision_config": size, "text_config": {}}
    write(directory / ("pytorch_model.bin" if pickled else "model.safetensors"), named, pickled=pickled)
    (directory / "config.json").write_text(json.dumps(values))
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor",
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_normalize": True, "do_rescale": True,
        "rescale_factor": 1 / 255, "resample": 3,
        **({"size": {"shortest_edge": image}, "crop_size": {"height": image, "width": image}, "do_center_crop": True}
           if kind == "clip" else {"size": {"height": image, "width": image}}),
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tensors, config


def language_model(directory: Path, *, tied=False, dtype=torch.float32, generator=None):
    """A Llama with a tokenizer that has no image token. Gives its tensors in fp32 and its configuration."""
    import tiny
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        tiny.CORPUS,
        trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=WIDE, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=2,
        bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = draw(generator, *parameter.shape)
    model.to(dtype).save_pretrained(directory)
    words.save_pretrained(directory)
    return {name: p.detach().float() for name, p in model.named_parameters()}, config


def projector_tensors(generator, depth=2, bias=True) -> dict:
    """In XTuner's numbering."""
    tensors = {}
    for number in range(depth):
        tensors[f"{2 * number}.weight"] = draw(generator, WIDE, HIDDEN if not number else WIDE)
        if bias:
            tensors[f"{2 * number}.bias"] = draw(generator, WIDE)
    return tensors


def by_hand(text, text_config, vision, vision_config, projector, *, layer, strategy, act="gelu"):
    """The model that transformers makes of these tensors."""
    import transformers

    config = transformers.LlavaConfig(
        text_config=text_config, vision_config=vision_config, vision_feature_layer=layer, projector_hidden_act=act,
        vision_feature_select_strategy=strategy, image_token_id=3, multimodal_projector_bias="0.bias" in projector,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    state = {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t for n, t in text.items()
    }
    state |= {f"model.vision_tower.{name}": tensor for name, tensor in vision.items()}
    for number, old in ((1, "0"), (2, "2")):
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in projector:
                state[f"model.multi_modal_projector.linear_{number}.{kind}"] = projector[f"{old}.{kind}"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def logits(model, image_id: int, count: int, seed: int = 0, size: int = 56) -> torch.Tensor:
    """Of one prompt with one image of noise, for the vocabulary without the image token."""
    generator = torch.Generator().manual_seed(seed)
    ids = [7, 8, *[image_id] * count, 9, 10, 11]
    pixels = torch.randn(1, 3, size, size, generator=generator)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]


def release(root: Path, *, depth: int = 2, pickled: bool = False) -> Path:
    """A release as XTuner's converter writes it, with its bases beside."""
    generator = torch.Generator().manual_seed(3)
    text, _ = language_model(root / "llm", generator=generator)
    vision, _ = vision_tower(root / "clip", generator=generator)
    of_text = lora_of(text, ["model.layers.1.mlp.up_proj"], [3], generator)
    of_vision = lora_of(vision, ["encoder.layers.0.mlp.fc1"], [2], generator)
    named = {f"vision_model.{name}": pair for name, pair in of_vision.items()}
    out = root / "release"
    write_adapter(out / "llm_adapter", of_text, 6, pickled=pickled, base=str(root / "llm"))
    write_adapter(out / "visual_encoder_adapter", named, 4, pickled=pickled, base=str(root / "clip"))
    projector = {f"model.{n}": t for n, t in projector_tensors(generator, depth).items()}
    file = "pytorch_model.bin" if pickled else "model.safetensors"
    write(out / "projector" / file, projector, pickled=pickled)
    config = {"model_type": "projector", "depth": depth, "hidden_act": "gelu", "auto_map": {"AutoModel": "x.Y"}}
    (out / "projector" / "config.json").write_text(json.dumps(config))
    return out
