"""Qwen-7B and its kin, base and Chat → Qwen2. `c_attn` is q, k, v in thirds; w2 is the gate, w1 the up projection;
`intermediate_size` counts both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.foreign.layouts.layout import DTYPE, Config, Converted, Layout, must_be, number, present
from onward.foreign.layouts.rules import Rule, named, thirds

OLD = {
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings", "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size", "attn_pdrop": "attn_dropout_prob", "embd_pdrop": "emb_dropout_prob",
}  # fmt: skip
"""Names of the first release's keys; the embedding has the padded rows."""


def convert_config(config: Config, source: Path) -> Converted:
    """Qwen2's configuration.

    Beyond `seq_length` the original changes its rotary base (dynamic NTK) and its queries' scale (log-n) in evaluation,
    not in training; Qwen2 does neither, so the result is stated to reach to `seq_length` where either is on.
    """
    where = str(source / "config.json")
    config = {**config, **{new: config[old] for old, new in OLD.items() if old in config}}
    heads, width = number(config, "num_attention_heads", where), number(config, "hidden_size", where)
    must_be(config, "scale_attn_weights", True, "Qwen2 always scales", where)
    must_be(config, "rotary_pct", 1.0, "Qwen2 turns the whole head", where)
    must_be(config, "no_bias", True, "Qwen2 has a bias in q, k and v alone", where)
    if config.get("kv_channels", width // heads) * heads != width:
        raise InputError(f"kv_channels: {config['kv_channels']} times {heads} heads is not {width}", where=where)
    mlp = number(config, "intermediate_size", where)
    if mlp % 2:
        raise InputError(f"intermediate_size: {mlp} is not twice a width", where=where)
    longest, limits = _longest(config, where)
    if dropout := config.get("emb_dropout_prob"):
        limits += (f"emb_dropout_prob {dropout}: Qwen2 has no dropout after the embedding; it acts in training only",)
    converted: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": number(config, "vocab_size", where),
        "hidden_size": width,
        "intermediate_size": mlp // 2,
        "num_hidden_layers": number(config, "num_hidden_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": float(config.get("rotary_emb_base", 10000)),
        "attention_dropout": config.get("attn_dropout_prob", 0.0),
        "use_sliding_window": False,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **present(config, "initializer_range", "use_cache", *DTYPE),
    }
    return Converted(converted, limits)


def _longest(config: Config, where: str) -> tuple[int, tuple[str, ...]]:
    reach = number(config, "max_position_embeddings", where)
    acts = [
        word
        for key, word in (("use_dynamic_ntk", "dynamic NTK"), ("use_logn_attn", "log-n attention"))
        if config.get(key, True)
    ]
    if not acts:
        return reach, ()
    reach = min(reach, number(config, "seq_length", where))
    said = f"beyond {reach} tokens the original adds {' and '.join(acts)} in evaluation, which Qwen2 does not have"
    return reach, (f"{said}: exact up to {reach} tokens, and in training at any length",)


LAYERS = {
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def rules(config: Config, here: str = "model") -> tuple[Rule, ...]:
    """`here` is the decoder's name in our model. Packers of 4-bit weights add biases of zero to every layer."""
    own, theirs = rf"{here}.layers.\1.", r"transformer\.h\.(\d+)\."
    whole = {"transformer.wte": f"{here}.embed_tokens", "transformer.ln_f": f"{here}.norm", "lm_head": "lm_head"}
    return (
        *named("", "", whole),
        Rule(rf"{theirs}attn\.c_attn", thirds(*(f"{own}self_attn.{part}_proj" for part in "qkv"))),
        *named(theirs, own, LAYERS, bias=False),
        *named(theirs, own, {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}),
        Rule(r"transformer\.rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(masked_bias|rotary_emb\.inv_freq)"),
        Rule(r"transformer\.h\.\d+\.attn|transformer\.logn_tensor"),  # `attn.bias`, the causal mask
    )


def write_files(source: Path, out: Path, config: Config, converted: Config) -> list[str]:
    from onward.foreign.layouts.sidecars import write_generation_config
    from onward.foreign.layouts.tiktoken import TEMPLATE, convert_tokenizer

    tokens, notes = convert_tokenizer(source, out, chat_template=TEMPLATE)
    write_generation_config(source, out, ends=(tokens["<|im_end|>"], tokens["<|endoftext|>"]))
    return notes


ORDER = (
    "transformer", "lm_head", "wte", "h", "ln_f", "ln_1", "attn", "ln_2", "mlp", "c_attn", "w1", "w2", "c_proj",
)  # fmt: skip
QWEN = Layout("Qwen", "Qwen2ForCausalLM", convert_config, rules, write_files, order=ORDER)
