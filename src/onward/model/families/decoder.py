"""Decoder-only language models that transformers' AutoModelForCausalLM builds."""

from onward.model.families.family import Family

MODULES = {
    "language_model": ("model.", "lm_head."),
    "embed_tokens": ("model.embed_tokens.",),
    "lm_head": ("lm_head.",),
}

DECODER = Family(
    name="decoder",
    model_types=("llama", "mistral", "qwen2", "qwen3", "internlm3"),
    auto_class="AutoModelForCausalLM",
    modules=MODULES,
)

OTHER = Family(name="other", model_types=(), auto_class="AutoModelForCausalLM", modules={})
