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


TOWER = {
    **{f"model.vision_tower.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(4)},
    **{f"model.vision_tower.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(4)},
    "model.vision_tower.embeddings.patch_embedding.weight": (8, 3, 2, 2),
    "model.vision_tower.pre_layrnorm.weight": (8,),
    "model.vision_tower.post_layernorm.weight": (8,),
    "model.multi_modal_projector.linear_1.weight": (16, 8),
    "model.language_model.embed_tokens.weight": (50, 16),
    "model.language_model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.language_model.layers.1.self_attn.q_proj.weight": (16, 16),
    "lm_head.weight": (50, 16),
}


def tower(train, **stage):
    plan = Stage.model_validate({"name": "s", "train": train, "data": [{"path": "x"}], "steps": 1, **stage})
    linear = {name for name, shape in TOWER.items() if looks_linear(name, shape)}
    return select(plan, LLAVA, TOWER, linear, tied=False, where={key: f"plan.yaml: {key}" for key in train})


def test_layer_decay_counts_from_the_head_down_as_beit_does():
    selection = tower({"vision_tower": full(layer_decay=0.5, learning_rate=1.0, weight_decay=0.2)})
    scale = {name: group.learning_rate for group in selection.groups for name in group.parameters}
    # timm and BeiT: embeddings are layer 0 and blocks 1 to 4 of n = 5; rate · decay^(n - k)
    assert scale["model.vision_tower.embeddings.patch_embedding.weight"] == 0.5**5
    assert scale["model.vision_tower.pre_layrnorm.weight"] == 0.5**5
    assert [scale[f"model.vision_tower.layers.{i}.self_attn.q_proj.weight"] for i in range(4)] == [
        0.5**4, 0.5**3, 0.5**2, 0.5,
    ]  # fmt: skip
    assert scale["model.vision_tower.post_layernorm.weight"] == 1.0
    by_name = {group.name: group for group in selection.groups}
    assert list(by_name)[:4] == [
        "vision_tower.embeddings", "vision_tower.embeddings.no_decay", "vision_tower.layer_0",
        "vision_tower.layer_0.no_decay",
    ]  # fmt: skip
    assert list(by_name)[-1] == "vision_tower.head.no_decay"
    assert (by_name["vision_tower.layer_3"].weight_decay, by_name["vision_tower.layer_3.no_decay"].weight_decay) == (
        0.2,
        0.0,
    )
    trained = [name for group in selection.groups for name in group.parameters]
    assert sorted(trained) == sorted(name for name in TOWER if "vision_tower" in name)


def test_a_tower_keeps_its_depth_where_a_pattern_takes_some_layers_and_lora_counts_alike():
    some = tower({r"vision_tower\.layers\.[01]\.": full(layer_decay=0.5, learning_rate=1.0)})
    assert {group.learning_rate for group in some.groups} == {0.5**4, 0.5**3}
    lora = tower({"language_model": {"mode": "lora", "layer_decay": 0.5, "learning_rate": 1.0, "rank": 2}})
    rates = {group.name: group.learning_rate for group in lora.groups}
    assert rates == {"language_model.layer_0": 0.25, "language_model.layer_1": 0.5}


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"projector": full(layer_decay=0.9)}, "plan.yaml: projector: has no numbered layers"),
        ({r"\.layers\.": full(layer_decay=0.9)}, "numbers its layers twice, in model.language_model.layers. and"),
    ],
)
def test_layer_decay_needs_one_tower(train, says):
    with pytest.raises(PlanError, match=says):
        tower(train)


def test_a_late_module_s_groups_know_when_they_begin():
    selection = tower({"projector": full(), "vision_tower": full(start_step=7)})
    assert {(group.key, group.start_step) for group in selection.groups} == {("projector", 0), ("vision_tower", 7)}


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"projector": full(start_step=1), "lm_head": {"mode": "frozen"}}, "nothing learns at the first step"),
        ({"projector": full(), "lm_head": {"mode": "frozen", "start_step": 2}}, "start_step: only for what is trained"),
    ],
)
def test_start_steps_that_make_no_sense(train, says):
    with pytest.raises(ValueError, match=says):
        tower(train)
