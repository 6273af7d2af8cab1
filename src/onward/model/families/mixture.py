"""Decoders with a mixture of experts. The files hold each expert's matrices, the model in memory all of a layer's as
one tensor: what is trained lies outside them, and a merge copies them as they are."""

from onward.model.families.decoder import MODULES
from onward.model.families.family import Family

MIXTURE = Family(
    name="mixture",
    model_types=("mixtral", "qwen2_moe", "qwen3_moe"),
    auto_class="AutoModelForCausalLM",
    modules=MODULES,
    renames=((r"\.block_sparse_moe\.", ".mlp."),),  # Mixtral's name on disk
    experts=r"\.experts\.",
    not_linear=r"\.mlp\.gate\.weight$",  # the router: a matrix, not a linear layer
)
