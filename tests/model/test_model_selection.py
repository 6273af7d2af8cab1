"""The plan's `train` table over parameter names: a partition, with errors that name line and key."""

import pytest

from onward.errors import PlanError
from onward.model.families import FAMILIES, find_family
from onward.model.families.llava import LLAVA
from onward.model.selection import looks_linear, select
from onward.plan.schema import Stage

SHAPES = {
    "model.vision_tower.embeddings.patch_embedding.weight": (8, 3, 2, 2),
    "model.vision_tower.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.vision_tower.layers.0.self_attn.q_proj.bias": (8,),
    "model.multi_modal_projector.linear_1.weight": (16, 8),
    "model.language_model.embed_tokens.weight": (50, 16),
    "model.language_model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.language_model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.language_model.norm.weight": (16,),
    "lm_head.weight": (50, 16),
}
LINEAR = {name for name, shape in SHAPES.items() if looks_linear(name, shape)}


def table(train, *, tied=False, **stage):
    plan = Stage.model_validate({"name": "s", "train": train, "data": [{"path": "x"}], "steps": 1, **stage})
    names = {name: shape for name, shape in SHAPES.items() if not (tied and name == "lm_head.weight")}
    where = {key: f"plan.yaml:{line}" for line, key in enumerate(train, start=1)}
    return select(plan, LLAVA, names, LINEAR & set(names), tied=tied, where=where)


def full(**more):
    return {"mode": "full", **more}


def test_modules_partition_and_name_each_parameter_once():
    selection = table({"language_model": full(), "projector": full(), "vision_tower": full()})
    assert None not in selection.owner.values()
    trained = [name for group in selection.groups for name in group.parameters]
    assert sorted(trained) == sorted(SHAPES)


def test_the_longest_module_wins_and_what_is_not_named_is_frozen():
    selection = table(
        {"language_model": full(), "embed_tokens": full(learning_rate=1e-5), "lm_head": {"mode": "frozen"}}
    )
    assert selection.owner["model.language_model.embed_tokens.weight"] == "embed_tokens"
    assert selection.owner["lm_head.weight"] == "lm_head"
    assert selection.owner["model.multi_modal_projector.linear_1.weight"] is None
    assert {group.name: group.learning_rate for group in selection.groups}["embed_tokens"] == 1e-5
    assert "lm_head.weight" not in selection.full


def test_a_pattern_goes_before_a_module():
    selection = table({"language_model": full(), "mlp": full(learning_rate_scale=0.5)}, learning_rate=1e-3)
    assert selection.owner["model.language_model.layers.0.mlp.up_proj.weight"] == "mlp"
    rates = {group.name: group.learning_rate for group in selection.groups}
    assert rates == {"language_model": 1e-3, "language_model.no_decay": 1e-3, "mlp": 5e-4}


def test_norms_and_biases_do_not_decay():
    selection = table({"vision_tower": full(weight_decay=0.3)})
    decays = {name: group.weight_decay for group in selection.groups for name in group.parameters}
    assert decays["model.vision_tower.layers.0.self_attn.q_proj.weight"] == 0.3
    assert decays["model.vision_tower.layers.0.self_attn.q_proj.bias"] == 0.0


def test_lora_adapts_linear_layers_and_leaves_the_head_unless_it_is_named():
    lora = {"mode": "lora", "rank": 4}
    layers = {layer.layer for layer in table({"language_model": lora}).lora}
    assert layers == {"model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.0.mlp.up_proj"}
    assert [layer.layer for layer in table({"lm_head": lora}).lora] == ["lm_head"]
    (group,) = table({"language_model": {**lora, "targets": ["q_proj"]}}).groups
    assert group.count == 4 * 16 + 16 * 4
    assert group.parameters[0] == "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("train", "options", "said"),
    [
        ({"projectr": full()}, {}, "did you mean projector"),
        ({"layers\\.7": full()}, {}, "matches no parameter"),
        ({"mlp(": full()}, {}, "no regular expression"),
        ({"up_proj": full(), "p_proj\\.": full()}, {}, "is claimed by"),
        ({"up_proj": full(), "mlp\\.up": full()}, {}, "matched longer by others"),
        ({"lm_head": full()}, {"tied": True}, "tied to embed_tokens"),
        ({"language_model": {"mode": "lora", "targets": ["wqkv"]}}, {}, "target wqkv matches no linear layer"),
        ({"language_model": {"mode": "frozen"}}, {}, "nothing is trained"),
    ],
)
def test_what_cannot_be_meant_is_an_error_with_its_line(train, options, said):
    with pytest.raises(PlanError) as caught:
        table(train, **options)
    assert said in str(caught.value)
    assert "plan.yaml:" in str(caught.value)


def test_modules_of_every_family_cut_language_model_into_named_parts():
    for family in FAMILIES:
        for part in ("embed_tokens", "lm_head"):
            for prefix in family.modules[part]:
                assert any(prefix.startswith(outer) for outer in family.modules["language_model"])


@pytest.mark.parametrize(
    "disk",
    [
        "language_model.model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    ],
)
def test_every_layout_of_llava_has_one_canonical_name(disk):
    assert LLAVA.to_canonical(disk) == "model.language_model.layers.0.mlp.up_proj.weight"
    for head in ("language_model.lm_head.weight", "lm_head.weight"):
        assert LLAVA.to_canonical(head) == "lm_head.weight"
    for tower in ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"):
        assert LLAVA.to_canonical(tower) == "model.vision_tower.post_layernorm.bias"
        assert LLAVA.to_canonical("model." + tower) == "model.vision_tower.post_layernorm.bias"


def test_code_that_comes_with_a_model_is_refused():
    with pytest.raises(Exception, match="never runs such code"):
        find_family({"model_type": "baichuan", "auto_map": {}}, "config.json")
