"""InternLM2 → Llama. Rows of `wqkv` are [kv head][the q heads of its group, k, v][head_dim]; w1 is the gate, w3 the
up and w2 the down projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.foreign.layouts.layout import DTYPE, Config, Converted, Layout, number, present
from onward.foreign.layouts.rules import Part, Rows, Rule, named
from onward.foreign.layouts.sidecars import convert_text_tokenizer, write_generation_config


def convert_config(config: Config, source: Path) -> Converted:
    """Llama's configuration with the same numbers."""
    return Converted(*text_config(config, str(source / "config.json")))


def text_config(config: Config, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Llama's configuration, and its limits. InputError for a rope scaling other than dynamic or linear."""
    heads, width = number(config, "num_attention_heads", where), number(config, "hidden_size", where)
    kv_heads = config.get("num_key_value_heads") or heads
    if width % heads or heads % kv_heads:
        raise InputError(f"{width} wide, {heads} heads, {kv_heads} key-value heads do not divide", where=where)
    config = {**config, **(config.get("rope_parameters") or {})}  # where newer versions of transformers write it
    scaling, limits = rope_scaling(config, where)
    kept = present(
        config, "hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", *DTYPE
    )
    converted: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": number(config, "vocab_size", where),
        "hidden_size": width,
        "intermediate_size": number(config, "intermediate_size", where),
        "num_hidden_layers": number(config, "num_hidden_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": float(config.get("rope_theta", 10000)),
        "attention_bias": bool(config.get("bias", True)),
        "mlp_bias": False,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **scaling,
        **kept,
    }
    return converted, limits


def rope_scaling(config: Config, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Ours for theirs: both compute `dynamic` and `linear` alike."""
    newer = config.get("rope_parameters") or {}
    given = config.get("rope_scaling") or (newer if newer.get("rope_type", "default") != "default" else None)
    if not given:
        return {}, ()
    kind = given.get("type", given.get("rope_type")) if isinstance(given, dict) else None
    factor = given.get("factor") if isinstance(given, dict) else None
    if kind not in ("dynamic", "linear") or not isinstance(factor, (int, float)) or factor < 1:
        raise InputError(f"rope_scaling: {given!r} cannot be converted: only dynamic and linear are known", where=where)
    limits: tuple[str, ...] = ()
    if kind == "dynamic":
        longest = config.get("max_position_embeddings", 2048)
        limits = (
            f"dynamic rope beyond {longest} tokens: the original code keeps the larger table for shorter inputs that "
            "come after a long one; here every input has its own",
        )
    return {"rope_scaling": {"type": kind, "rope_type": kind, "factor": float(factor)}}, limits


LAYERS = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def rules(config: Config, here: str = "model", there: str = "") -> tuple[Rule, ...]:
    """`here` is the decoder's name in our model, `there` what stands before its names in theirs (a pattern)."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    group = heads // kv_heads
    there += r"(?:model\.)?"  # InternLM2Model by itself has it not
    own, theirs = rf"{here}.layers.\1.", rf"{there}layers\.(\d+)\."
    fused = (("q", 0, group), ("k", group, group + 1), ("v", group + 1, group + 2))
    parts = (Part(f"{own}self_attn.{x}_proj", Rows(kv_heads, group + 2, first, end)) for x, first, end in fused)
    return (
        *named(there, "", {"tok_embeddings": f"{here}.embed_tokens", "norm": f"{here}.norm", "output": "lm_head"}),
        Rule(rf"{theirs}attention\.wqkv", tuple(parts)),
        *named(theirs, own, LAYERS),
        Rule(rf"{theirs}attention\.rotary_emb\.inv_freq"),
    )


def write_files(source: Path, out: Path, config: Config, converted: Config) -> list[str]:
    write_generation_config(source, out)
    return convert_text_tokenizer(source, out)


ORDER = (
    "model", "output", "tok_embeddings", "layers", "norm", "attention", "feed_forward", "attention_norm", "ffn_norm",
    "wqkv", "wo", "w1", "w3", "w2",
)  # fmt: skip
INTERNLM2 = Layout("InternLM2", "LlamaForCausalLM", convert_config, rules, write_files, order=ORDER)
