"""Tiny mixtures of experts, built offline from configurations."""

from __future__ import annotations

from pathlib import Path

import tiny


def mixture(directory: Path, kind: str) -> Path:
    """A decoder with four experts a layer: mixtral, qwen2_moe or qwen3_moe."""
    import torch
    import transformers

    words = tiny.tokenizer()
    size = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.1,
    }  # fmt: skip
    if kind == "mixtral":
        config = transformers.MixtralConfig(**size, num_local_experts=4)
    else:
        experts = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
        kinds = {"qwen2_moe": transformers.Qwen2MoeConfig, "qwen3_moe": transformers.Qwen3MoeConfig}
        config = kinds[kind](**size, **experts, shared_expert_intermediate_size=16)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
