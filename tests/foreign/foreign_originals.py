"""Models in foreign layouts, of random sizes and weights, and what their own code computes of them: written from the
published code's formulas over the names in the files, without any class of transformers' or rule of onward's.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import legacy_models as legacy
import torch
from torch.nn import functional as F

Tensors = dict[str, torch.Tensor]


def draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> Tensors:
    """Values that fit `dtype`; norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1]))
        is_norm = "norm" in name or ".ln_" in name or name.endswith(("mlp1.0.weight", "ls1", "ls2"))
        drawn[name] = (value + 1 if is_norm and not name.endswith("bias") else value).to(getattr(torch, dtype))
    return drawn


def language_config(kind: str, chance: random.Random, vocabulary: int, **changes) -> dict:
    """config.json of an InternLM2, Qwen, Phi-3, Qwen2, Qwen3 or Llama of random size."""
    head, kv = chance.choice((4, 8, 16)), chance.choice((1, 2, 3))
    heads = kv * (1 if kind == "qwen" else chance.choice((1, 2, 4)))
    width = head * heads
    size = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * chance.choice((12, 20, 33)),
        "num_hidden_layers": chance.choice((1, 2, 3)), "num_attention_heads": heads,
    }  # fmt: skip
    if kind == "qwen":
        config = {
            "kv_channels": head, "layer_norm_epsilon": chance.choice((1e-5, 1e-6)), "seq_length": 32,
            "max_position_embeddings": 64, "rotary_emb_base": chance.choice((10000, 1000000)), "rotary_pct": 1.0,
            "scale_attn_weights": True, "use_dynamic_ntk": chance.random() < 0.5, "no_bias": True, "fp16": True,
            "use_logn_attn": chance.random() < 0.5, "tie_word_embeddings": False, "attn_dropout_prob": 0.0,
        }  # fmt: skip
    else:
        names = {"internlm2": "InternLM2", "phi3": "Phi3", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        config = {
            "architectures": [f"{names[kind]}ForCausalLM"], "num_key_value_heads": kv, "hidden_act": "silu",
            "max_position_embeddings": 64, "rms_norm_eps": chance.choice((1e-5, 1e-6)),
            "tie_word_embeddings": chance.random() < 0.2,
            "rope_theta": chance.choice((10000, 1000000.0)), "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
    if kind == "internlm2":
        scaling = chance.choice((None, {"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 3.0}))
        config |= {"bias": chance.random() < 0.5, "rope_scaling": scaling}
    if kind == "phi3":
        factors = {key: [1 + chance.random() * 3 for _ in range(head // 2)] for key in ("short_factor", "long_factor")}
        scaled = {"type": chance.choice(("su", "longrope", "yarn")), **factors}
        config |= {
            "pad_token_id": 2, "original_max_position_embeddings": 24, "rope_scaling": chance.choice((None, scaled)),
            "sliding_window": chance.choice((None, 20, 512)), "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        }  # fmt: skip
    if kind == "qwen3":
        config |= {"head_dim": head + 4, "attention_bias": False}
    return {"model_type": kind, **size, **config, "torch_dtype": "float32", **changes}


def language_shapes(c: dict, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """What the files of such a model hold."""
    width, heads, mlp, kind = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"], c["model_type"]
    kv, head = c.get("num_key_value_heads", heads), c.get("head_dim", width // heads)
    q, both = heads * head, (heads + 2 * kv) * head
    names = {
        "internlm2": (
            {"attention.wqkv": (both, width), "attention.wo": (width, q), "feed_forward.w1": (mlp, width),
             "feed_forward.w3": (mlp, width), "feed_forward.w2": (width, mlp)},
            ("attention_norm", "ffn_norm"), ("model.tok_embeddings", "model.norm", "output"), "model.layers",
        ),
        "qwen": (
            {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width), "mlp.w1": (mlp // 2, width),
             "mlp.w2": (mlp // 2, width), "mlp.c_proj": (width, mlp // 2)},
            ("ln_1", "ln_2"), ("transformer.wte", "transformer.ln_f", "lm_head"), "transformer.h",
        ),
    }  # fmt: skip
    fused = {"self_attn.qkv_proj": (both, width), "mlp.gate_up_proj": (2 * mlp, width)}
    split = {f"self_attn.{part}_proj": (rows * head, width) for part, rows in zip("qkv", (heads, kv, kv), strict=True)}
    split |= {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width)}
    native = (
        {**(fused if kind == "phi3" else split), "self_attn.o_proj": (width, q), "mlp.down_proj": (width, mlp)},
        ("input_layernorm", "post_attention_layernorm"), ("model.embed_tokens", "model.norm", "lm_head"),
        "model.layers",
    )  # fmt: skip
    layers, norms, (embedding, last, output), stem = names.get(kind, native)
    biased = {"qwen": ("c_attn",), "qwen2": ("q_proj", "k_proj", "v_proj")}.get(kind, ())
    if kind == "internlm2" and c["bias"]:
        biased = ("wqkv", "wo")
    shapes = {f"{embedding}.weight": (c["vocab_size"], width), f"{last}.weight": (width,)}
    for n in range(c["num_hidden_layers"]):
        for name, shape in layers.items():
            shapes[f"{stem}.{n}.{name}.weight"] = shape
            if name.endswith(tuple(biased)) and biased:
                shapes[f"{stem}.{n}.{name}.bias"] = shape[:1]
        shapes |= {f"{stem}.{n}.{norm}.weight": (width,) for norm in norms}
        if kind == "qwen3":
            shapes |= {f"{stem}.{n}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
    if not c["tie_word_embeddings"]:
        shapes[f"{output}.weight"] = (c["vocab_size"], width)
    return {prefix + name: shape for name, shape in shapes.items()}


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(c: dict, length: int, head: int):
    """cos and sin [length, head] of positions 0, 1, …: plain, linear, dynamic (a first forward), su and yarn."""
    base, scaling = float(c.get("rotary_emb_base", c.get("rope_theta", 10000))), c.get("rope_scaling") or {}
    kind, longest, steps, factor, size = scaling.get("type"), c["max_position_embeddings"], 1.0, 1.0, 1.0
    if kind == "dynamic" and length > longest:
        base *= (scaling["factor"] * length / longest - (scaling["factor"] - 1)) ** (head / (head - 2))
    if kind == "linear":
        steps = 1 / scaling["factor"]
    if "short_factor" in scaling:
        original = c["original_max_position_embeddings"]
        factor = torch.tensor(scaling["long_factor" if length > original else "short_factor"])
        stretch = longest / original
        if stretch > 1 and kind == "yarn":
            size = 0.1 * math.log(stretch) + 1
        elif stretch > 1:
            size = math.sqrt(1 + math.log(stretch) / math.log(original))
    frequencies = 1 / (factor * base ** (torch.arange(0, head, 2).float() / head))
    angles = torch.outer(torch.arange(length).float() * steps, frequencies)
    return (torch.cat([angles, angles], -1).cos() * size, torch.cat([angles, angles], -1).sin() * size)


def turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def split_rows(kind: str, fused, heads: int, kv: int, head: int):
    """q, k, v [length, heads, head] of what the fused layer gives."""
    if kind == "internlm2":
        grouped = fused.reshape(len(fused), kv, heads // kv + 2, head)
        return grouped[:, :, :-2].reshape(len(fused), heads, head), grouped[:, :, -2], grouped[:, :, -1]
    q, k, v = fused.split([heads * head, kv * head, kv * head], -1)
    return tuple(x.reshape(len(fused), -1, head) for x in (q, k, v))


def decoder(c: dict, given: Tensors, embeddings) -> torch.Tensor:
    """Logits [length, vocabulary] of one row of embeddings, without padding."""
    kind, heads = c["model_type"], c["num_attention_heads"]
    kv, head = c.get("num_key_value_heads", heads), c.get("head_dim", c["hidden_size"] // heads)
    eps = c.get("rms_norm_eps", c.get("layer_norm_epsilon"))
    stem = "transformer.h" if kind == "qwen" else "model.layers"
    length, x = len(embeddings), embeddings
    cos, sin = (table[:, None] for table in rope(c, length, head))
    window = c.get("sliding_window") if kind == "phi3" else None
    apart = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (apart < 0) if window is None else (apart < 0) | (apart > window)

    def linear(name: str, value):
        return F.linear(value, given[f"{name}.weight"], given.get(f"{name}.bias"))

    for n in range(c["num_hidden_layers"]):
        at = f"{stem}.{n}."
        norms = {"internlm2": ("attention_norm", "ffn_norm"), "qwen": ("ln_1", "ln_2")}
        one, two = norms.get(kind, ("input_layernorm", "post_attention_layernorm"))
        y = rms(x, given[f"{at}{one}.weight"], eps)
        fused = {"internlm2": "attention.wqkv", "qwen": "attn.c_attn", "phi3": "self_attn.qkv_proj"}.get(kind)
        parts = [linear(f"{at}{fused}", y)] if fused else [linear(f"{at}self_attn.{p}_proj", y) for p in "qkv"]
        q, k, v = split_rows(kind, torch.cat(parts, -1), heads, kv, head)
        if kind == "qwen3":
            q, k = (rms(value, given[f"{at}self_attn.{p}_norm.weight"], eps) for p, value in (("q", q), ("k", k)))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        k, v = (value.repeat_interleave(heads // kv, 1) for value in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head)
        seen = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)
        out = {"internlm2": "attention.wo", "qwen": "attn.c_proj"}.get(kind, "self_attn.o_proj")
        x = x + linear(at + out, seen)
        y = rms(x, given[f"{at}{two}.weight"], eps)
        if kind == "phi3":
            gate, up = linear(f"{at}mlp.gate_up_proj", y).chunk(2, -1)
            down = "mlp.down_proj"
        else:
            gate, up, down = {
                "internlm2": ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
                "qwen": ("mlp.w2", "mlp.w1", "mlp.c_proj"),
            }.get(kind, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
            gate, up = linear(at + gate, y), linear(at + up, y)
        x = x + linear(at + down, F.silu(gate) * up)
    x = rms(x, given["transformer.ln_f.weight" if kind == "qwen" else "model.norm.weight"], eps)
    output = "output.weight" if kind == "internlm2" else "lm_head.weight"
    return F.linear(x, given[output] if output in given else embedding_of(c, given))


def embedding_of(c: dict, given: Tensors) -> torch.Tensor:
    names = {"internlm2": "model.tok_embeddings.weight", "qwen": "transformer.wte.weight"}
    return given[names.get(c["model_type"], "model.embed_tokens.weight")]


def tower_config(chance: random.Random, **changes) -> dict:
    """vision_config of an InternViT: the 300M's biases and LayerNorm, the 6B's normed queries and RMSNorm, or mixed."""
    heads, patch = chance.choice((1, 2, 3)), chance.choice((4, 7))
    return {
        "model_type": "intern_vit_6b", "hidden_size": heads * chance.choice((4, 8)), "num_attention_heads": heads,
        "num_hidden_layers": chance.choice((2, 3)), "intermediate_size": chance.choice((16, 27)), "patch_size": patch,
        "image_size": patch * chance.choice((4, 8)), "qkv_bias": chance.random() < 0.5, "hidden_act": "gelu",
        "qk_normalization": chance.random() < 0.5, "norm_type": chance.choice(("layer_norm", "rms_norm")),
        "layer_norm_eps": 1e-6, "dropout": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.1, "num_channels": 3,
        **changes,
    }  # fmt: skip


def tower_shapes(v: dict, wide: int, ratio: float) -> dict[str, tuple[int, ...]]:
    w, mlp, patch = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, w),
        "vision_model.embeddings.patch_embedding.weight": (w, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (w,),
        "vision_model.embeddings.position_embedding": (1, (v["image_size"] // patch) ** 2 + 1, w),
    }
    for n in range(v["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{n}."
        layers = {"attn.proj": (w, w), "mlp.fc1": (mlp, w), "mlp.fc2": (w, mlp), "attn.qkv": (3 * w, w)}
        for name, shape in layers.items():
            shapes[f"{at}{name}.weight"] = shape
            if name != "attn.qkv" or v["qkv_bias"]:
                shapes[f"{at}{name}.bias"] = shape[:1]
        normed = [*(("attn.q_norm", "attn.k_norm") if v["qk_normalization"] else ()), "norm1", "norm2"]
        shapes |= {f"{at}{name}.weight": (w,) for name in normed}
        if v["norm_type"] == "layer_norm":
            shapes |= {f"{at}{name}.bias": (w,) for name in ("norm1", "norm2")}
        shapes |= {f"{at}ls1": (w,), f"{at}ls2": (w,)}
    block = w * int(1 / ratio) ** 2
    for name, shape in {"0": (block,), "1": (wide, block), "3": (wide, wide)}.items():
        shapes |= {f"mlp1.{name}.weight": shape, f"mlp1.{name}.bias": shape[:1]}
    return shapes


def features(c: dict, given: Tensors, pixels) -> torch.Tensor:
    """What the language model reads of one image [3, side, side]: [tokens, width]."""
    v, ratio = c["vision_config"], c["downsample_ratio"]
    w, heads, eps, at = v["hidden_size"], v["num_attention_heads"], v["layer_norm_eps"], "vision_model.embeddings."
    patches = F.conv2d(
        pixels[None], given[f"{at}patch_embedding.weight"], given[f"{at}patch_embedding.bias"], stride=v["patch_size"]
    )
    side, position, stored = patches.shape[-1], given[f"{at}position_embedding"], v["image_size"] // v["patch_size"]
    grid = position[:, 1:].reshape(1, stored, stored, w).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    x = torch.cat([given[f"{at}class_embedding"], patches.flatten(2).transpose(1, 2)], 1)
    states = [(x + torch.cat([position[:, :1], grid], 1))[0]]

    def norm(name: str, value):
        if v["norm_type"] == "rms_norm":
            return rms(value, given[f"{name}.weight"], eps)
        return F.layer_norm(value, (w,), given[f"{name}.weight"], given[f"{name}.bias"], eps)

    for n in range(v["num_hidden_layers"]):
        at, x = f"vision_model.encoder.layers.{n}.", states[-1]
        fused = F.linear(norm(f"{at}norm1", x), given[f"{at}attn.qkv.weight"], given.get(f"{at}attn.qkv.bias"))
        q, k, value = fused.chunk(3, -1)
        if v["qk_normalization"]:
            q, k = (rms(t, given[f"{at}attn.{p}_norm.weight"], eps) for p, t in (("q", q), ("k", k)))
        q, k, value = (t.reshape(len(t), heads, -1) for t in (q, k, value))
        weights = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(w // heads)).softmax(-1)
        seen = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        x = x + F.linear(seen, given[f"{at}attn.proj.weight"], given[f"{at}attn.proj.bias"]) * given[f"{at}ls1"]
        inner = F.gelu(F.linear(norm(f"{at}norm2", x), given[f"{at}mlp.fc1.weight"], given[f"{at}mlp.fc1.bias"]))
        states.append(x + F.linear(inner, given[f"{at}mlp.fc2.weight"], given[f"{at}mlp.fc2.bias"]) * given[f"{at}ls2"])
    seen, step = states[c["select_layer"]][1:].reshape(side, side, w), round(1 / ratio)
    count = side // step  # a token is step × step patches, row by row
    blocks = seen.reshape(count, step, count, step, w).permute(0, 2, 1, 3, 4).reshape(count * count, -1)
    y = F.layer_norm(blocks, blocks.shape[-1:], given["mlp1.0.weight"], given["mlp1.0.bias"])
    y = F.gelu(F.linear(y, given["mlp1.1.weight"], given["mlp1.1.bias"]))
    return F.linear(y, given["mlp1.3.weight"], given["mlp1.3.bias"])


def logits(c: dict, given: Tensors, ids: list[int], images=(), image_id: int = -1) -> torch.Tensor:
    """What the original gives for one row of ids; every `image_id` is one place for a token of the images, in order."""
    given = {name: tensor.float() for name, tensor in given.items()}
    if "llm_config" not in c:
        return decoder(c, given, F.embedding(torch.tensor(ids), embedding_of(c, given)))
    text = {n.removeprefix("language_model."): t for n, t in given.items() if n.startswith("language_model.")}
    embedded = F.embedding(torch.tensor(ids), embedding_of(c["llm_config"], text))
    if len(images):
        embedded[torch.tensor(ids) == image_id] = torch.cat([features(c, given, image) for image in images])
    return decoder(c["llm_config"], text, embedded)


def write(directory: Path, config: dict, seed: int, *, dtype="float32", shards=1, pickled=False) -> Tensors:
    """Weights and config.json of a random model; its tensors."""
    if "llm_config" in config:
        shapes = tower_shapes(config["vision_config"], config["llm_config"]["hidden_size"], config["downsample_ratio"])
        shapes |= language_shapes(config["llm_config"], "language_model.")
    else:
        shapes = language_shapes(config)
    tensors = draw(shapes, seed, dtype)
    legacy.save(directory, tensors, config, shards=shards, pickled=pickled)
    return tensors


def internvl_config(chance: random.Random, kind: str, vocabulary: int, **changes) -> dict:
    vision, ratio = tower_config(chance), chance.choice((0.5, 0.25))
    return {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "downsample_ratio": ratio,
        "force_image_size": chance.choice((None, vision["image_size"], 12 * vision["patch_size"])), "ps_version": "v2",
        "select_layer": chance.choice((-1, -2, 1)), "template": chance.choice(("internlm2-chat", "Hermes-2")),
        "torch_dtype": "float32", "max_dynamic_patch": 6, "dynamic_image_size": True, "use_thumbnail": True,
        "llm_config": language_config(kind, chance, vocabulary), "vision_config": vision, **changes,
    }  # fmt: skip


def qwen_vl(directory: Path, chance: random.Random, seed: int) -> tuple[dict, Tensors]:
    """A first Qwen-VL of random size: its language model is as wide as the resampler's heads of 128 are."""
    legacy.tiktoken_files(directory, size=280)
    text = language_config("qwen", chance, 280 + 217 + 3)
    out, heads, patch = 128 * chance.choice((1, 2)), chance.choice((1, 2, 4)), chance.choice((7, 14))
    head, both = 64 // heads * heads, chance.choice((True, False))
    width = out if both else head
    text |= {"hidden_size": out, "num_attention_heads": 4, "kv_channels": out // 4, "seq_length": 512}
    text |= {"max_position_embeddings": 512}
    visual = {
        "width": width, "heads": heads, "layers": chance.choice((1, 2)), "mlp_ratio": chance.choice((2.0, 4.9231)),
        "patch_size": patch, "image_size": patch * chance.choice((3, 4, 16)), "output_dim": out,
        "image_start_id": 280 + 208 + 6, "n_queries": chance.choice((1, 4, 16)),
    }  # fmt: skip
    mlp, at = int(width * visual["mlp_ratio"]), "transformer.visual."
    shapes: dict[str, tuple[int, ...]] = {"positional_embedding": (256, width), "proj": (out, out)}
    shapes |= {"conv1.weight": (width, 3, patch, patch), "attn_pool.query": (visual["n_queries"], out)}
    norms = {"ln_pre": width, "ln_post": out, "attn_pool.ln_q": out, "attn_pool.ln_kv": out}
    layers = {"attn_pool.attn.out_proj": (out, out)}
    for n in range(visual["layers"]):
        block = f"transformer.resblocks.{n}."
        norms |= {f"{block}ln_1": width, f"{block}ln_2": width}
        layers |= {
            f"{block}attn.in_proj": (3 * width, width), f"{block}attn.out_proj": (width, width),
            f"{block}mlp.c_fc": (mlp, width), f"{block}mlp.c_proj": (width, mlp),
        }  # fmt: skip
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"attn_pool.attn.in_proj_weight": (3 * out, out), "attn_pool.attn.in_proj_bias": (3 * out,)}
    if width != out:
        shapes["attn_pool.kv_proj.weight"] = (out, width)
    config = {**text, "visual": visual}
    tensors = draw({**language_shapes(text), **{at + name: shape for name, shape in shapes.items()}}, seed, "float32")
    tensors[f"{at}attn_pool.pos_embed"] = legacy.sines(visual["n_queries"], out)
    legacy.save(directory, tensors, config, pickled=chance.random() < 0.5)
    return config, tensors


def resized(positions, side: int):
    """Positions of a square grid on another: bicubic, corners not aligned."""
    grid = positions.reshape(1, math.isqrt(len(positions)), math.isqrt(len(positions)), -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T


def attended(q, k, v, heads: int):
    q, k, v = (value.reshape(len(value), heads, -1) for value in (q, k, v))
    weights = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def qwen_vl_features(c: dict, given: Tensors, pixels) -> torch.Tensor:
    """What the language model reads of one image [3, side, side]: [queries, width]."""
    v, at = c["visual"], "transformer.visual."
    own = {name.removeprefix(at): tensor.float() for name, tensor in given.items() if name.startswith(at)}

    def norm(name: str, value):
        return F.layer_norm(value, value.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)

    def linear(name: str, value):
        return F.linear(value, own[f"{name}.weight"], own.get(f"{name}.bias"))

    patches = F.conv2d(pixels[None], own["conv1.weight"], stride=v["patch_size"])[0]
    side = patches.shape[-1]
    x = norm("ln_pre", patches.flatten(1).T + resized(own["positional_embedding"], side))
    for n in range(v["layers"]):
        block = f"transformer.resblocks.{n}."
        fused = linear(f"{block}attn.in_proj", norm(f"{block}ln_1", x)).reshape(len(x), v["heads"], 3, -1)
        seen = attended(*(fused[:, :, part].flatten(1) for part in range(3)), v["heads"])
        x = x + linear(f"{block}attn.out_proj", seen)
        x = x + linear(f"{block}mlp.c_proj", F.gelu(linear(f"{block}mlp.c_fc", norm(f"{block}ln_2", x))))
    source = linear("attn_pool.kv_proj", x) if "attn_pool.kv_proj.weight" in own else x
    source, places = norm("attn_pool.ln_kv", source), own["attn_pool.pos_embed"]
    query = norm("attn_pool.ln_q", own["attn_pool.query"]) + places
    weights, biases = own["attn_pool.attn.in_proj_weight"].chunk(3), own["attn_pool.attn.in_proj_bias"].chunk(3)
    parts = (query, source + resized(places, side), source)
    q, k, value = (F.linear(part, w, b) for part, w, b in zip(parts, weights, biases, strict=True))
    y = linear("attn_pool.attn.out_proj", attended(q, k, value, v["output_dim"] // 128))
    return norm("ln_post", y) @ own["proj"]


def tokenizer_files(directory: Path, kind: str) -> int:
    """A tokenizer that fits the language model; how many ids there are."""
    if kind == "qwen":
        legacy.tiktoken_files(directory)
        return 420 + 208
    if kind.startswith("qwen"):
        import tiny_vision

        words = tiny_vision.tokenizer("internvl")
        words.save_pretrained(directory)
        return len(words)
    legacy.sentencepiece_files(directory, images=True)
    file = directory / "tokenizer_config.json"
    if kind != "internlm2":
        given = {key: value for key, value in json.loads(file.read_text()).items() if key != "auto_map"}
        template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        more = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "chat_template": template}
        file.write_text(json.dumps(given | more))
    return max(json.loads((directory / "added_tokens.json").read_text()).values()) + 1


def slow_llama(directory: Path):
    """LlamaTokenizer of transformers 4 without tokenizer.json, as a function: text cut at the added tokens, the rest
    through sentencepiece; `legacy: false` puts a space before the whole text and none before its later parts.
    """
    import re

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    given = json.loads((directory / "tokenizer_config.json").read_text())
    added = {token["content"]: int(number) for number, token in given["added_tokens_decoder"].items()}
    cut = re.compile("(" + "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) + ")")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((directory / "tokenizer.model").read_bytes())
    old = given.get("legacy", True)
    if not old:
        model.normalizer_spec.add_dummy_prefix = False
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    start = [1] if given.get("add_bos_token", True) else []

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for chunk in filter(None, cut.split(text if old or not text else f"▁{text}")):
            if chunk in added:
                found.append(added[chunk])
            elif old:
                found += pieces.encode(chunk)
            else:  # after an <unk>, so that sentencepiece keeps its spaces
                found += pieces.encode(f"<unk>{chunk}")[len(pieces.encode("<unk>")) :]
        if not old and len(found) > 1 and pieces.id_to_piece(found[0]) == "▁" and found[1] in added.values():
            del found[0]
        return start + found

    return encode
