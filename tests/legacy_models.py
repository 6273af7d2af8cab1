"""Tiny models in the layouts of InternLM2, Qwen-7B and InternVL chat, made of native ones by the way back.

Written apart from onward's own rules, head by head: what the import gives must be the native model again, bit for bit.
"""

from __future__ import annotations

import base64
import io
import json
import random
from itertools import pairwise
from pathlib import Path

CORPUS = [
    "the quick brown fox jumps over the lazy dog", "what colour is the picture? red green blue yellow",
    "今天的市场很热闹，电车九点开。", "请描述这张图片", "for (int i = 0; i < 10; ++i) { x[i] += 2; }",
    "    indented\n\n\ttabs  and   spaces", "un café, déjà vu", "🙂🚋 emoji",
]  # fmt: skip
CLASSES = {
    "English": ["the", " quick", " brown", "it's", " We'll", " 1234", " 3.14", "!", "\n", " don't", "x[i]", "'S"],
    "Chinese": ["今天", "的", "市场", "请描述", "，", "。", "日本語", " 中 文 ", "ひらがな", "\u3000"],
    "emoji": ["🙂", "🚋", "👩‍👩‍👧", " 🇨🇳", "❤️", "🙂🙂", "é", "e\u0301", "ﬁ"],
    "spaces": [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "a", "\xa0", " b "],
    "special": ["<|im_start|>", "<|im_end|>", "user\n", "<|im_", "start|>", "<s>", "</s>", "hello", "<|endoftext|>"],
}  # fmt: skip


def texts(kind: str, count: int, seed: int) -> list[str]:
    """Random strings of one class."""
    chance = random.Random(f"{kind}{seed}")
    return ["".join(chance.choices(CLASSES[kind], k=chance.randint(0, 12))) for _ in range(count)]


def lively(model, dtype: str = "float32", scale: float | None = 0.3, seed: int = 1):
    """Every parameter drawn anew, biases and norms too, so that a wrong place shows; in fp32, values that fit.
    Without a scale as the class itself begins: a model to train.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = parameter.data if scale is None else torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = drawn.to(getattr(torch, dtype)).float()
    return model.eval()


def save(directory: Path, tensors: dict, config: dict, *, dtype="float32", shards=1, pickled=False) -> None:
    """A model directory as the tools wrote it: safetensors or .bin, one file or several with an index."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)  # a tokenizer may lie there
    (directory / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for n in range(shards):
        part = {name: tensors[name].contiguous() for name in names[n::shards]}
        part = {name: t.to(getattr(torch, dtype)) if t.dtype == torch.float32 else t for name, t in part.items()}
        file = f"{stem}-{n + 1:05}-of-{shards:05}.{ending}" if shards > 1 else f"{stem}.{ending}"
        if pickled:
            torch.save(part, directory / file)
        else:
            save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def wqkv(q, k, v, heads: int, kv_heads: int):
    """Of [heads][d], [kv heads][d], [kv heads][d] rows the fused ones: for each kv head its q heads, then k, v."""
    import torch

    size, group = q.shape[0] // heads, heads // kv_heads
    pieces = []
    for head in range(kv_heads):
        pieces += [q[(head * group + i) * size : (head * group + i + 1) * size] for i in range(group)]
        pieces += [k[head * size : (head + 1) * size], v[head * size : (head + 1) * size]]
    return torch.cat(pieces)


def internlm2_tensors(state: dict, heads: int, kv_heads: int, prefix: str = "", theirs: str = "") -> dict:
    """Llama's tensors (`prefix` before its `layers`) in InternLM2's names (`theirs` before its own)."""
    import re

    layers = 1 + max(int(name.split("layers.")[1].split(".")[0]) for name in state if f"{prefix}layers." in name)
    given = {f"{theirs}model.tok_embeddings.weight": state[f"{prefix}embed_tokens.weight"]}
    for n in range(layers):
        old, new = f"{prefix}layers.{n}.", f"{theirs}model.layers.{n}."
        for kind in ("weight", "bias"):
            if f"{old}self_attn.q_proj.{kind}" in state:
                q, k, v = (state[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv")
                given[f"{new}attention.wqkv.{kind}"] = wqkv(q, k, v, heads, kv_heads)
                given[f"{new}attention.wo.{kind}"] = state[f"{old}self_attn.o_proj.{kind}"]
        for ours, name in {
            "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        }.items():  # fmt: skip
            given[f"{new}{name}.weight"] = state[f"{old}{ours}.weight"]
    given[f"{theirs}model.norm.weight"] = state[f"{prefix}norm.weight"]
    head = re.sub(r"model\.(language_model\.)?$", "", prefix) + "lm_head.weight"
    if head in state:
        given[f"{theirs}output.weight"] = state[head]
    return given


def internlm2_config(native, **changes) -> dict:
    c = native
    rope = c.rope_parameters
    scaling = {"type": rope["rope_type"], "factor": rope["factor"]} if rope["rope_type"] != "default" else None
    return {
        "model_type": "internlm2", "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "hidden_act": "silu", "bias": c.attention_bias,
        "max_position_embeddings": c.max_position_embeddings, "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": rope["rope_theta"], "rope_scaling": scaling, "tie_word_embeddings": c.tie_word_embeddings,
        "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, **changes,
    }  # fmt: skip


def text_config(**changes):
    import transformers

    scaling = changes.pop("scaling", {})
    size = {
        "vocab_size": 420, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **scaling},
    }  # fmt: skip
    return transformers.LlamaConfig(**size | changes)


def internlm2(directory: Path, *, dtype="float32", shards=1, pickled=False, prefix=True, scale=0.3, **changes):
    """An InternLM2 in `directory`; gives the Llama that it is."""
    import transformers

    native = lively(transformers.LlamaForCausalLM(text_config(**changes)), dtype, scale)
    c = native.config
    tensors = internlm2_tensors(native.state_dict(), c.num_attention_heads, c.num_key_value_heads, "model.")
    if c.tie_word_embeddings:
        del tensors["output.weight"]
    save(directory, tensors, internlm2_config(c, torch_dtype=dtype), dtype=dtype, shards=shards, pickled=pickled)
    sentencepiece_files(directory, prefix=prefix)
    return native


def qwen_tensors(state: dict, prefix: str = "model.") -> dict:
    import torch

    given = {"transformer.wte.weight": state[f"{prefix}embed_tokens.weight"]}
    for n in range(sum(name.endswith("input_layernorm.weight") for name in state)):
        old, new = f"{prefix}layers.{n}.", f"transformer.h.{n}."
        for kind in ("weight", "bias"):
            parts = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            given[f"{new}attn.c_attn.{kind}"] = torch.cat(parts)
        given[f"{new}attn.c_proj.weight"] = state[f"{old}self_attn.o_proj.weight"]
        given[f"{new}mlp.w1.weight"] = state[f"{old}mlp.up_proj.weight"]
        given[f"{new}mlp.w2.weight"] = state[f"{old}mlp.gate_proj.weight"]
        given[f"{new}mlp.c_proj.weight"] = state[f"{old}mlp.down_proj.weight"]
        given[f"{new}ln_1.weight"] = state[f"{old}input_layernorm.weight"]
        given[f"{new}ln_2.weight"] = state[f"{old}post_attention_layernorm.weight"]
    return given | {"transformer.ln_f.weight": state[f"{prefix}norm.weight"], "lm_head.weight": state["lm_head.weight"]}


def qwen_config(c, **changes) -> dict:
    return {
        "model_type": "qwen", "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": 2 * c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads, "no_bias": True,
        "kv_channels": c.hidden_size // c.num_attention_heads, "layer_norm_epsilon": c.rms_norm_eps,
        "max_position_embeddings": 256, "seq_length": 64, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "scale_attn_weights": True, "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
        "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, **changes,
    }  # fmt: skip


def qwen(
    directory: Path, *, dtype="float32", shards=1, pickled=False, quantised=0, group=32, ordered=False, theirs=(),
    scale=0.3, **changes,
):  # fmt: skip
    """A Qwen-7B in `directory`, GPTQ-packed where `quantised` gives the bits; the Qwen2 that it is."""
    import transformers

    size = {
        "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    native = lively(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size | changes)), dtype, scale)
    config = qwen_config(native.config, **dict(theirs))
    tensors = qwen_tensors(native.state_dict())
    if quantised:
        tensors = pack(native, tensors, quantised, group, ordered=ordered)
        config["quantization_config"] = {"quant_method": "gptq", "bits": quantised, "group_size": group, "sym": True}
    save(directory, tensors, config, dtype=dtype, shards=shards, pickled=pickled)
    tiktoken_files(directory)
    return native


def qwen_vl(
    directory: Path, *, dtype="float32", shards=1, pickled=False, quantised=0, width=32, side=28, queries=16, theirs=(),
    scale=0.3, **changes,
):  # fmt: skip
    """A first Qwen-VL in `directory`; the model of onward's own class that it is."""
    import transformers

    from onward.model.first_qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

    tiktoken_files(directory, size=280)
    start = 280 + 208 + 6
    text = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    text = transformers.Qwen2Config(**text | changes)
    vision = {
        "width": width, "layers": 2, "heads": 2, "mlp_ratio": 2.5, "image_size": side, "patch_size": 14,
        "queries": queries,
    }  # fmt: skip
    config = QwenVLConfig(text_config=text, vision_config=vision, image_start_id=start, image_token_id=start + 2)
    native = lively(QwenVLForConditionalGeneration(config), dtype, scale)
    native.model.visual.attn_pool.pos_embed.copy_(sines(queries, text.hidden_size))
    state = native.state_dict()
    tensors = qwen_tensors(
        {name: tensor for name, tensor in state.items() if ".visual." not in name}, "model.language_model."
    )
    tensors |= {f"transformer{name[5:]}": tensor for name, tensor in state.items() if ".visual." in name}
    visual = {key: value for key, value in vision.items() if key != "queries"}
    given = qwen_config(
        text, torch_dtype=dtype, seq_length=512, max_position_embeddings=512, attn_dropout_prob=0.1,
        visual={**visual, "output_dim": text.hidden_size, "n_queries": queries, "image_start_id": start},
        **dict(theirs),
    )  # fmt: skip
    if quantised:
        tensors = pack(native, tensors, quantised, prefix="model.language_model.")
        given["quantization_config"] = {"quant_method": "gptq", "bits": quantised, "group_size": 32, "sym": True}
    save(directory, tensors, given, dtype=dtype, shards=shards, pickled=pickled)
    return native


def sines(count: int, width: int):
    """2D positions: half for x, then half for y, each [sin, cos]."""
    import math

    import torch

    side, quarter = math.isqrt(count), width // 4
    omega = 10000.0 ** (-torch.arange(quarter) / quarter)
    rows = []
    for y in range(side):
        angles = [(x * omega, y * omega) for x in range(side)]
        rows += [torch.cat([f for angle in pair for f in (angle.sin(), angle.cos())]) for pair in angles]
    return torch.stack(rows)


def pack(native, tensors: dict, bits: int, group: int = 32, prefix: str = "model.", ordered: bool = False) -> dict:
    """Every layer of the blocks packed, value by value; `native` gets the weights that this leaves (in fp32)."""
    import torch

    packed = {}
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        if not name.startswith("transformer.h.") or not name.endswith(
            (".c_attn.weight", ".c_proj.weight", ".w1.weight", ".w2.weight")
        ):
            packed[name] = weight
            continue
        rows, columns = weight.shape
        chance = torch.Generator().manual_seed(rows * columns)
        q = torch.randint(0, 2**bits, (columns, rows), generator=chance)
        size = group if group > 0 else columns
        zero = torch.randint(0, 2**bits, (columns // size, rows), generator=chance)
        scales = (torch.rand(columns // size, rows, generator=chance) * 0.02).half()
        g_idx = (torch.arange(columns) if ordered else torch.randperm(columns, generator=chance)) // size
        per = 32 // bits
        qweight, qzeros = (
            torch.zeros(columns // per, rows, dtype=torch.int64),
            torch.zeros(columns // size, rows // per, dtype=torch.int64),
        )
        for i in range(columns):
            qweight[i // per] |= q[i] << (bits * (i % per))
        for i in range(rows):
            qzeros[:, i // per] |= (zero[:, i] - 1) % 2**bits << (bits * (i % per))
        packed |= {
            f"{layer}.qweight": _int32(qweight), f"{layer}.qzeros": _int32(qzeros), f"{layer}.scales": scales,
            **({} if ordered else {f"{layer}.g_idx": g_idx.int()}),
        }  # fmt: skip
        if f"{layer}.bias" not in tensors:
            packed[f"{layer}.bias"] = torch.zeros(rows, dtype=torch.float16)
        tensors[name] = (scales.float()[g_idx] * (q - zero[g_idx])).t()
    state = native.state_dict()
    for n in range(native.config.get_text_config().num_hidden_layers):
        new, old = f"{prefix}layers.{n}.", f"transformer.h.{n}."
        for part, rows in zip("qkv", tensors[f"{old}attn.c_attn.weight"].chunk(3), strict=True):
            state[f"{new}self_attn.{part}_proj.weight"].copy_(rows)
        state[f"{new}self_attn.o_proj.weight"].copy_(tensors[f"{old}attn.c_proj.weight"])
        state[f"{new}mlp.up_proj.weight"].copy_(tensors[f"{old}mlp.w1.weight"])
        state[f"{new}mlp.gate_proj.weight"].copy_(tensors[f"{old}mlp.w2.weight"])
        state[f"{new}mlp.down_proj.weight"].copy_(tensors[f"{old}mlp.c_proj.weight"])
    return packed


def _int32(values):
    import torch

    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def internvl(
    directory: Path, *, six_b=False, text="internlm2", dtype="float32", shards=1, pickled=False, theirs=(),
    scale=0.3, **changes,
):  # fmt: skip
    """An InternVL chat in `directory` with a vision tower of the 300M or 6B kind; the native InternVL that it is."""
    import torch
    import transformers

    if text == "internlm2":
        sentencepiece_files(directory, images=True)
        added = json.loads((directory / "added_tokens.json").read_text())
    else:
        import tiny
        import tiny_vision

        words = tiny_vision.tokenizer("internvl")
        words.chat_template = tiny.CHATML
        words.save_pretrained(directory)
        added = words.get_vocab()
    vocabulary = max(added.values()) + 1
    inner = text_config(vocab_size=vocabulary, **changes)
    if text != "internlm2":
        left = ("model_type", "head_dim", "attention_bias", "pad_token_id")
        given = {k: v for k, v in inner.to_dict().items() if k not in left}
        kinds = {"qwen2": transformers.Qwen2Config, "phi3": transformers.Phi3Config}
        inner = kinds[text](**given, pad_token_id=0)
    vision = transformers.InternVLVisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=[56, 56],
        patch_size=[14, 14], attention_bias=not six_b, use_qk_norm=six_b,
        norm_type="rms_norm" if six_b else "layer_norm",
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=inner, image_token_id=added["<IMG_CONTEXT>"], image_seq_length=4,
        tie_word_embeddings=inner.tie_word_embeddings,
    )  # fmt: skip
    native = lively(transformers.InternVLForConditionalGeneration(config), dtype, scale)
    state = native.state_dict()
    tensors = {}
    tower = "model.vision_tower."
    for ours, name in {
        "cls_token": "class_embedding", "position_embeddings": "position_embedding",
        "patch_embeddings.projection.weight": "patch_embedding.weight",
        "patch_embeddings.projection.bias": "patch_embedding.bias",
    }.items():  # fmt: skip
        tensors[f"vision_model.embeddings.{name}"] = state[f"{tower}embeddings.{ours}"]
    for n in range(vision.num_hidden_layers):
        old, new = f"{tower}encoder.layer.{n}.", f"vision_model.encoder.layers.{n}."
        for kind in ("weight", "bias"):
            if f"{old}attention.q_proj.{kind}" in state:
                parts = [state[f"{old}attention.{part}_proj.{kind}"] for part in "qkv"]
                tensors[f"{new}attn.qkv.{kind}"] = torch.cat(parts)
            for ours, name in {
                "attention.projection_layer": "attn.proj", "attention.q_norm": "attn.q_norm", "mlp.fc1": "mlp.fc1",
                "attention.k_norm": "attn.k_norm", "mlp.fc2": "mlp.fc2", "layernorm_before": "norm1",
                "layernorm_after": "norm2",
            }.items():  # fmt: skip
                if f"{old}{ours}.{kind}" in state:
                    tensors[f"{new}{name}.{kind}"] = state[f"{old}{ours}.{kind}"]
        tensors[f"{new}ls1"], tensors[f"{new}ls2"] = state[f"{old}lambda_1"], state[f"{old}lambda_2"]
    for ours, name in {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}.items():
        for kind in ("weight", "bias"):
            tensors[f"mlp1.{name}.{kind}"] = state[f"model.multi_modal_projector.{ours}.{kind}"]
    if text == "internlm2":
        heads, kv_heads = inner.num_attention_heads, inner.num_key_value_heads
        tensors |= internlm2_tensors(state, heads, kv_heads, "model.language_model.", "language_model.")
        llm_config = internlm2_config(inner, torch_dtype=dtype)
    else:
        for name, tensor in state.items():
            if name.startswith("model.language_model."):
                tensors[name.replace("model.language_model.", "language_model.model.")] = tensor
        tensors["language_model.lm_head.weight"] = state["lm_head.weight"]
        llm_config = {**inner.to_dict(), "rope_theta": 1e6, "rope_parameters": None}
    if inner.tie_word_embeddings:
        tensors.pop("language_model.output.weight", None)
        tensors.pop("language_model.lm_head.weight", None)
    given = {
        "model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5, "force_image_size": 56, "ps_version": "v2", "select_layer": -1,
        "template": "internlm2-chat", "torch_dtype": dtype, "max_dynamic_patch": 6, "min_dynamic_patch": 1,
        "dynamic_image_size": True, "use_thumbnail": True, "llm_config": llm_config,
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 56, "image_size": 56, "patch_size": 14, "qkv_bias": not six_b,
            "qk_normalization": six_b, "norm_type": vision.norm_type, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
            "dropout": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.0,
        },
        **dict(theirs),
    }  # fmt: skip
    save(directory, tensors, given, dtype=dtype, shards=shards, pickled=pickled)
    return native


def internvl_phi3(directory: Path, **changes):
    return internvl(directory, text="phi3", **changes)


SPECIAL = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def sentencepiece_files(directory: Path, *, prefix: bool = True, images: bool = False, extra_spaces: bool = False):
    """InternLM2's tokenizer files: names laid over six unused pieces; of InternVL nine tokens more, added behind."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=prefix, hard_vocab_limit=False,
        remove_extra_whitespaces=extra_spaces, minloglevel=2,
        user_defined_symbols=[f"[UNUSED_TOKEN_{n}]" for n in range(141, 147)],
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    named = dict(enumerate(["<unk>", "<s>", "</s>"]))
    named |= {pieces.piece_to_id(f"[UNUSED_TOKEN_{141 + n}]"): name for n, name in enumerate(SPECIAL)}
    if images:
        behind = {name: len(pieces) + n for n, name in enumerate(IMAGE_TOKENS)}
        (directory / "added_tokens.json").write_text(json.dumps(behind))
        named |= {number: name for name, number in behind.items()}
    config = {
        "tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_internlm2.X", None]},
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>",
        "added_tokens_decoder": {str(i): {"content": name, **flags} for i, name in named.items()},
        "additional_special_tokens": SPECIAL + (IMAGE_TOKENS if images else []),
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def slow_sentencepiece(directory: Path):
    """The original's tokenizer as a function: text cut at the added tokens, the rest through sentencepiece."""
    import re

    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    given = json.loads((directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {token["content"]: int(number) for number, token in given.items()}
    cut = re.compile("(" + "|".join(re.escape(t) for t in sorted(ids, key=len, reverse=True)) + ")")

    def encode(text: str) -> list[int]:
        found = [1]
        for chunk in filter(None, cut.split(text)):
            found += [ids[chunk]] if chunk in ids else pieces.encode(chunk)
        return found

    return encode


def tiktoken_files(directory: Path, size: int = 420, alone: bytes = b"") -> None:
    """qwen.tiktoken: 256 bytes in GPT-2's order, what a byte-level BPE learns, a token that no two others make."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    letters = {chr(b) if b in printable else chr(256 + order.index(b) - len(printable)): b for b in order}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size - bool(alone), initial_alphabet=list(letters), show_progress=False)
    bpe.train_from_iterator([*CORPUS, "a  b   c    d     e"] * 2, trainer)
    learnt = sorted(bpe.get_vocab().items(), key=lambda pair: pair[1])
    tokens = [bytes([byte]) for byte in order]
    tokens += [bytes(letters[c] for c in token) for token, _ in learnt if len(token) > 1]
    if alone:
        tokens.append(alone)
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (directory / "qwen.tiktoken").write_bytes(b"".join(lines))
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 256}))


def slow_tiktoken(directory: Path, special: dict[str, int], pattern: str):
    """tiktoken's algorithm, the lowest rank first, the leftmost of equals; special tokens anywhere."""
    import re
    import unicodedata

    import regex

    lines = (directory / "qwen.tiktoken").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
    cut = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def piece(data: bytes) -> list[int]:
        if data in ranks:
            return [ranks[data]]
        parts = [data[i : i + 1] for i in range(len(data))]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not pairs:
                return [ranks[part] for part in parts]
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for chunk in filter(None, cut.split(unicodedata.normalize("NFC", text))):
            if chunk in special:
                found.append(special[chunk])
            else:
                found += [number for word in regex.findall(pattern, chunk) for number in piece(word.encode())]
        return found

    return encode
