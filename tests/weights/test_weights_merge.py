"""The merge against peft's own, bit for bit, and what it must keep, use up and refuse."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import weights_peft as peft_side
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from onward.checkpoint.save import Snapshot, save_checkpoint
from onward.errors import DamageError, InputError
from onward.weights import fold
from onward.weights.lora import open_adapter
from onward.weights.merge import merge
from onward.weights.quantised import Quantisation, dequantised, to_json

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
CONFIGS = {
    "all linear layers": ("llama", {}),
    "rank and alpha patterns": (
        "llama",
        {
            "rank_pattern": {r"layers\.1\..*_proj": 3, DOWN: 5, "up_proj": 2},
            "alpha_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 7, "k_proj": 1},
        },
    ),
    "rslora with patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    ),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "a head trained in full": ("llama", {"modules_to_save": ["lm_head"]}),
    "dora with patterns": (
        "llama",
        {"use_dora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    ),
    "dora and rslora, an embedding too": (
        "llama",
        {"use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "dora, bf16 base": ("qwen3-bf16", {"use_dora": True}),
    "tied, layers with bias": ("qwen2-tied", {}),
    "bf16 base, fp32 adapter": ("qwen3-bf16", {}),
    "llava": ("llava", {"modules_to_save": ["multi_modal_projector"]}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_merge_has_the_bits_of_pefts(bases, tmp_path, monkeypatch, case):
    monkeypatch.setattr(fold, "PIECE", 100)  # so that even these tensors are made in pieces
    kind, config = CONFIGS[case]
    base = bases(kind)
    model = peft_side.adapt(base, tmp_path / "adapter", **config)
    expected = peft_side.merged_by_peft(model)
    report = peft_side.merged_by_us(tmp_path / "adapter", base, tmp_path / "out")
    merged = peft_side.load(tmp_path / "out").state_dict()
    assert peft_side.different(merged, expected) == []
    before = peft_side.tensors_of(base)
    changed = [
        name for name, value in peft_side.tensors_of(tmp_path / "out").items() if not torch.equal(value, before[name])
    ]
    assert len(changed) == report.merged + report.replaced > 0
    assert report.copied == len(before) - len(changed)


def test_pieces_of_a_product_have_the_bits_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    for rank, columns in ((64, 1536), (3, 513), (16, 30000), (1, 64)):
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(1000, rank, generator=generator)
        pieces = torch.cat([b[begin : begin + fold.ROWS] @ a for begin in range(0, 1000, fold.ROWS)])
        assert torch.equal(pieces, b @ a)


@pytest.mark.parametrize("kinds", [({}, {}), ({}, {"use_dora": True}), ({"use_dora": True}, {"use_rslora": True})])
def test_several_adapters_are_merged_one_after_the_other_as_peft_does(bases, tmp_path, kinds):
    import peft

    base, names = bases("llama"), ["first", "second"]
    for seed, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        peft_side.adapt(base, tmp_path / name, seed=seed, r=3 + seed, target_modules=["q_proj", name_of[seed]], **kind)
    model = peft.PeftModel.from_pretrained(peft_side.load(base), tmp_path / "first", adapter_name="first")
    model.load_adapter(str(tmp_path / "second"), adapter_name="second")
    merged = model.merge_and_unload(adapter_names=names)
    peft_side.merged_by_us([tmp_path / name for name in names], None, tmp_path / "out")
    ours, theirs = peft_side.load(tmp_path / "out").state_dict(), merged.state_dict()
    if "use_dora" in kinds[1]:  # PEFT takes the base's lengths from (base + first) - first, which has been rounded
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6) for name in ours)
    else:
        assert peft_side.different(ours, theirs) == []


name_of = ["up_proj", "down_proj"]


def test_two_adapters_that_replace_one_weight_are_refused(bases, tmp_path):
    for seed, options in enumerate(({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]})):
        peft_side.adapt(bases("llama"), tmp_path / str(seed), seed=seed, target_modules=["q_proj"], **options)
    with pytest.raises(InputError, match=r"lm_head\.weight: was trained twice"):
        peft_side.merged_by_us([tmp_path / "0", tmp_path / "1"], None, tmp_path / "out")
    peft_side.adapt(bases("llama"), tmp_path / "2", target_modules=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head\.weight: was trained twice"):
        peft_side.merged_by_us([tmp_path / "0", tmp_path / "2"], None, tmp_path / "out")


def test_adapters_of_different_bases_need_one_named(bases, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bases("llama"), other)
    peft_side.adapt(bases("llama"), tmp_path / "0", target_modules=["q_proj"])
    peft_side.adapt(other, tmp_path / "1", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"(?s)different bases.*--base"):
        peft_side.merged_by_us([tmp_path / "0", tmp_path / "1"], None, tmp_path / "out")
    assert peft_side.merged_by_us([tmp_path / "0", tmp_path / "1"], other, tmp_path / "out").merged == 2


@pytest.mark.parametrize("how", [Quantisation(4), Quantisation(8)], ids=str)
def test_after_training_on_a_quantised_base_either_base_s_values_are_taken(bases, tmp_path, how):
    peft_side.adapt(bases("llama"), tmp_path / "adapter", target_modules=["up_proj"])
    with pytest.raises(InputError, match=r"quantisation\.json"):
        peft_side.merged_by_us(tmp_path / "adapter", None, tmp_path / "out", base_values="dequantised")
    layers = {f"model.layers.{n}.mlp.{name}": how for n in (0, 1) for name in ("up_proj", "gate_proj")}
    (tmp_path / "adapter/quantisation.json").write_text(json.dumps(to_json(layers)))
    before = peft_side.tensors_of(bases("llama"))
    plain = peft_side.merged_by_us(tmp_path / "adapter", None, tmp_path / "original")
    left = peft_side.merged_by_us(tmp_path / "adapter", None, tmp_path / "left", base_values="dequantised")
    assert plain.base_values == "original" and left.base_values == "dequantised"
    assert left.drift["dequantised"] == 0 < left.drift["original"] < 0.2
    assert any("0 with the dequantised" in line for line in left.lines())
    original, dequantised_ = peft_side.tensors_of(tmp_path / "original"), peft_side.tensors_of(tmp_path / "left")
    gate = UP.replace("up", "gate") + ".weight"
    assert torch.equal(original[gate], before[gate])
    assert torch.equal(dequantised_[gate], dequantised(before[gate], how))
    change = original[f"{UP}.weight"] - before[f"{UP}.weight"]
    assert torch.allclose(dequantised_[f"{UP}.weight"], dequantised(before[f"{UP}.weight"], how) + change, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("learns", [True, False])
def test_an_adapter_with_added_tokens_brings_vocabulary_and_tokenizer(bases, tmp_path, kind, learns):
    from transformers import AutoTokenizer

    base, directory = tmp_path / "base", tmp_path / "adapter"
    peft_side.load(bases(kind)).save_pretrained(base, max_shard_size="40KB")
    tokenizer = AutoTokenizer.from_pretrained(bases(kind))
    tokenizer.save_pretrained(base)
    tokenizer.add_tokens(["zebra", "yak"])
    saved = {"modules_to_save": ["embed_tokens", *([] if "tied" in kind else ["lm_head"])]} if learns else {}
    saved |= {"ensure_weight_tying": True} if learns and "tied" in kind else {}
    model = peft_side.adapt(base, directory, tokens=len(tokenizer), target_modules=["q_proj"], **saved)
    expected = peft_side.merged_by_peft(model)
    with pytest.raises(InputError, match="tokenizer"):
        peft_side.merged_by_us(directory, None, tmp_path / "out")
    tokenizer.save_pretrained(directory)
    peft_side.merged_by_us(directory, None, tmp_path / "out")
    merged = peft_side.load(tmp_path / "out")
    assert peft_side.different(merged.state_dict(), expected) == []
    assert merged.config.vocab_size == len(tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = sum(value.nbytes for value in peft_side.tensors_of(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == total


def test_an_embedding_that_comes_with_the_adapter_stands_in_for_the_bases(bases, tmp_path):
    """PEFT saves the weight under an adapted embedding, and loads it over the base's."""
    import peft

    peft_side.adapt(bases("llama"), tmp_path / "adapter", target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    peft_side.rewrite(tmp_path / "adapter" / "adapter_model.safetensors", lambda t: t[key].add_(1))
    model = peft.PeftModel.from_pretrained(peft_side.load(bases("llama")), tmp_path / "adapter")
    peft_side.merged_by_us(tmp_path / "adapter", None, tmp_path / "out")
    merged = peft_side.load(tmp_path / "out").state_dict()
    assert peft_side.different(merged, peft_side.merged_by_peft(model)) == []


def test_every_type_gets_the_fp32_sum_cast_once(bases, tmp_path):
    base = bases("qwen3-bf16")
    peft_side.adapt(base, tmp_path / "adapter", target_modules=["up_proj"])
    peft_side.merged_by_us(tmp_path / "adapter", base, tmp_path / "out")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{UP}.lora_{half}.weight"] for half in "AB")
    before, after = (peft_side.tensors_of(path)[f"{UP}.weight"] for path in (base, tmp_path / "out"))
    assert torch.equal(after, (before.float() + (b @ a) * 3.0).bfloat16())
    rounded_first = before + ((b @ a) * 3.0).bfloat16()
    assert not torch.equal(after, rounded_first)  # else this case could not tell


def test_shards_keep_their_names_layout_and_untouched_bytes(bases, tmp_path):
    base = tmp_path / "base"
    peft_side.load(bases("llama")).save_pretrained(base, max_shard_size="60KB")
    index = "model.safetensors.index.json"
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    model = peft_side.adapt(base, tmp_path / "adapter", target_modules=["up_proj"])
    peft_side.merged_by_us(tmp_path / "adapter", base, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()
    for shard in shards:
        assert load_file(tmp_path / "out" / shard).keys() == load_file(base / shard).keys()
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    expected = peft_side.merged_by_peft(model)
    assert peft_side.different(peft_side.load(tmp_path / "out").state_dict(), expected) == []


def test_two_merges_have_the_same_bytes_and_the_report_their_digests(bases, tmp_path):
    from onward.files import digest_file

    base = bases("llava")
    peft_side.adapt(base, tmp_path / "adapter", modules_to_save=["multi_modal_projector"])
    one, other = (peft_side.merged_by_us(tmp_path / "adapter", base, tmp_path / out) for out in ("one", "other"))
    assert one == other
    written = {path.name: (path.stat().st_size, digest_file(path, "xxh3")) for path in (tmp_path / "one").iterdir()}
    assert written == {record.path: (record.size, record.digest) for record in one.files}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_files_of_a_complete_model_come_along_and_nothing_else(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    (base / "additional_chat_templates").mkdir()
    keep = ["LICENSE", "vocab.txt", "spiece.model", "preprocessor_config.json", "additional_chat_templates/tool.jinja"]
    leave = [
        "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "model-q4.gguf", "old.pth", "manifest.json",
        "consolidated.safetensors", ".gitattributes", "trainer_state.json", "adapter_config.json",
    ]  # fmt: skip
    for name in keep + leave:
        (base / name).write_text(f"{{}} {name}")
    peft_side.adapt(bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    peft_side.merged_by_us(tmp_path / "adapter", base, tmp_path / "out")
    out = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    given = {path.name for path in bases("llama").iterdir()}
    assert out == given | set(keep) and {"config.json", "generation_config.json", "tokenizer.json"} <= given
    for name in keep:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_an_adapter_of_the_older_llava_layout_is_understood(bases, tmp_path):
    base = bases("llava")
    peft_side.adapt(base, tmp_path / "adapter", target_modules=r".*language_model.*\.q_proj")
    peft_side.merged_by_us(tmp_path / "adapter", base, tmp_path / "new")

    def rename(tensors):
        for key in list(tensors):
            assert "model.model.language_model." in key
            tensors[key.replace("model.model.language_model.", "model.language_model.model.")] = tensors.pop(key)

    peft_side.rewrite(tmp_path / "adapter" / "adapter_model.safetensors", rename)
    peft_side.merged_by_us(tmp_path / "adapter", base, tmp_path / "old")
    assert peft_side.different(peft_side.tensors_of(tmp_path / "old"), peft_side.tensors_of(tmp_path / "new")) == []


def test_a_checkpoint_of_onward_merges_with_all_that_it_trained(bases, tmp_path):
    base = bases("llava")
    peft_side.adapt(base, tmp_path / "adapter", target_modules=["q_proj"])
    adapter = open_adapter(tmp_path / "adapter")
    name = "model.multi_modal_projector.linear_1.weight"
    full = {name: torch.full_like(peft_side.load(base).get_parameter(name), 0.5).detach()}
    snapshot = Snapshot("run", "align", 1, 16, "sha256:0", {}, full, adapter, {}, "adamw", {})
    save_checkpoint(snapshot, tmp_path / "step-000001")
    report = peft_side.merged_by_us(tmp_path / "step-000001", None, tmp_path / "out")
    assert report.replaced == 1 and report.merged == 2 + 2
    assert torch.equal(peft_side.load(tmp_path / "out").get_parameter(name), full[name])
    with (tmp_path / "step-000001" / "weights-00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(DamageError, match="weights-00000"):
        peft_side.merged_by_us(tmp_path / "step-000001", None, tmp_path / "again")


def merge_full(base, out, full, adapter=None):
    out.mkdir()
    adapters = [adapter] if adapter else []
    return merge(base, out, adapters=adapters, full=full, to_canonical=lambda name: name)


def test_full_weights_take_the_bases_type(bases, tmp_path):
    base = bases("qwen3-bf16")
    trained = torch.randn(32)
    merge_full(base, tmp_path / "out", {"model.norm.weight": trained})
    before, after = peft_side.tensors_of(base), peft_side.tensors_of(tmp_path / "out")
    assert torch.equal(after.pop("model.norm.weight"), trained.bfloat16())
    before.pop("model.norm.weight")
    assert peft_side.different(before, after) == []


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("trained_as", [EMBEDDING, HEAD])
@pytest.mark.parametrize("both_on_disk", [False, True])
def test_a_tied_weight_stays_tied(bases, tmp_path, both_on_disk, trained_as):
    base = tmp_path / "base"
    shutil.copytree(bases("qwen2-tied"), base)
    if both_on_disk:
        peft_side.rewrite(
            base / "model.safetensors", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()})
        )
    trained = torch.randn_like(peft_side.tensors_of(base)[EMBEDDING])
    merge_full(base, tmp_path / "out", {trained_as: trained})
    on_disk = peft_side.tensors_of(tmp_path / "out")
    assert (HEAD in on_disk) == both_on_disk
    model = peft_side.load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, trained)


def test_copies_that_differ_on_disk_are_not_tied_as_in_transformers(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases("qwen2-tied"), base)
    peft_side.rewrite(base / "model.safetensors", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    trained = torch.randn_like(peft_side.tensors_of(base)[EMBEDDING])
    merge_full(base, tmp_path / "out", {HEAD: trained})
    after = peft_side.tensors_of(tmp_path / "out")
    assert torch.equal(after[HEAD], trained)
    assert torch.equal(after[EMBEDDING], peft_side.tensors_of(base)[EMBEDDING])


def test_an_untied_head_that_equals_the_embedding_stays_apart(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    peft_side.rewrite(base / "model.safetensors", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    trained = torch.randn_like(peft_side.tensors_of(base)[EMBEDDING])
    merge_full(base, tmp_path / "out", {HEAD: trained})
    after = peft_side.tensors_of(tmp_path / "out")
    assert torch.equal(after[HEAD], trained) and not torch.equal(after[EMBEDDING], trained)


@pytest.mark.parametrize("config", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_an_adapter_on_a_tied_weight_is_refused(bases, tmp_path, config):
    peft_side.adapt(bases("qwen2-tied"), tmp_path / "adapter", **config)
    with pytest.raises(InputError, match=r"(?s)tied.*untie"):
        peft_side.merged_by_us(tmp_path / "adapter", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_trained_apart_from_its_tied_twin_is_refused(bases, tmp_path):
    peft_side.adapt(bases("qwen2-tied"), tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="apart"):
        peft_side.merged_by_us(tmp_path / "adapter", None, tmp_path / "out")


def test_tied_weights_that_peft_kept_tied_merge(bases, tmp_path):
    model = peft_side.adapt(
        bases("qwen2-tied"), tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    expected = peft_side.merged_by_peft(model)
    peft_side.merged_by_us(tmp_path / "adapter", None, tmp_path / "out")
    assert peft_side.different(peft_side.load(tmp_path / "out").state_dict(), expected) == []


@pytest.fixture
def adapter(bases, tmp_path):
    directory = tmp_path / "adapter"
    peft_side.adapt(bases("llama"), directory, target_modules=["up_proj"])
    return directory


A, B = (f"base_model.model.{UP}.lora_{half}.weight" for half in "AB")
BROKEN = {
    "half of a pair": (lambda t: t.pop(A), "lora_B.weight alone"),
    "a layer that the base has not": (
        lambda t: t.update({key.replace("layers.0", "layers.7"): t.pop(key) for key in (A, B)}),
        r"layers\.7\.mlp\.up_proj\.weight was trained",
    ),
    "a tensor of no known kind": (
        lambda t: t.update({f"base_model.model.{UP}.lora_magnitude_vector": torch.ones(64)}),
        "lora_magnitude_vector",
    ),
    "a bias": (lambda t: t.update({f"base_model.model.{UP}.lora_B.bias": torch.ones(64)}), r"lora_B\.bias"),
    "another rank": (lambda t: t.update({A: t[A][:2].clone()}), r"up_proj.*rank 4"),
    "another shape": (lambda t: t.update({B: t[B][:-1].clone()}), "up_proj"),
    "no prefix": (lambda t: t.update({"stray": torch.ones(1)}), "stray"),
    "an unknown weight": (
        lambda t: t.update({"base_model.model.score.weight": torch.ones(1)}),
        r"score\.weight was trained",
    ),
    "a replaced weight of another shape": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(33)}),
        r"model\.norm\.weight.*\(33,\)",
    ),
    "a weight under no adapter": (
        lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(1)}),
        "lm_head",
    ),
    "not a number": (lambda t: t[B].fill_(float("nan")), "up_proj.*not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_tensor_of_the_adapter_is_used_or_named(adapter, tmp_path, case):
    change, message = BROKEN[case]
    peft_side.rewrite(adapter / "adapter_model.safetensors", change)
    with pytest.raises(InputError, match=message):
        peft_side.merged_by_us(adapter, None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"), ("fan_in_fan_out", True), ("lora_bias", True), ("bias", "all"),
        ("trainable_token_indices", [1]), ("target_parameters", ["x"]), ("layer_replication", [[0, 1]]),
        ("use_qalora", True), ("init_lora_weights", "pissa"), ("init_lora_weights", "loftq"),
        ("a_later_variant", {"x": 1}),
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_by_name(adapter, tmp_path, key, value):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=key):
        peft_side.merged_by_us(adapter, None, tmp_path / "out")


def test_trained_both_in_the_adapter_and_beside_it_is_refused(adapter, bases, tmp_path):
    full = {f"{UP}.weight": torch.ones(64, 32)}
    with pytest.raises(InputError, match="twice"):
        merge_full(bases("llama"), tmp_path / "out", full, open_adapter(adapter))


def test_a_quantised_weight_is_refused(adapter, bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    name = f"{UP}.weight"
    peft_side.rewrite(base / "model.safetensors", lambda t: t.update({name: t[name].to(torch.uint8)}))
    with pytest.raises(InputError, match=r"up_proj.*U8"):
        peft_side.merged_by_us(adapter, base, tmp_path / "out")


def test_the_out_directory_must_be_free(adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        peft_side.merged_by_us(adapter, None, out)
    (out / "mine").unlink()
    peft_side.merged_by_us(adapter, None, out)
    assert (out / "config.json").exists()


def test_a_merge_that_is_killed_leaves_nothing_in_its_place_and_can_be_made_again(adapter, tmp_path, monkeypatch):
    from onward.checkpoint.tensorfile import TensorFileWriter

    peft_side.merged_by_us(adapter, None, tmp_path / "whole")
    write, written = TensorFileWriter.write_pieces, []

    def deadly(self, spec, pieces):
        write(self, spec, pieces)
        written.append(spec)
        os.kill(os.getpid(), 9) if len(written) == 2 else None

    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        monkeypatch.setattr(TensorFileWriter, "write_pieces", deadly)
        peft_side.merged_by_us(adapter, None, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".partial-out-*"))
    peft_side.merged_by_us(adapter, None, tmp_path / "out")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_too_little_space_is_said_before_anything_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match="the merged model needs"):
        peft_side.merged_by_us(adapter, None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_no_base_and_no_safetensors_say_what_to_do(adapter, tmp_path):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "someone/model"}))
    with pytest.raises(InputError, match=r"someone/model(.|\n)*--base"):
        peft_side.merged_by_us(adapter, None, tmp_path / "out")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        peft_side.merged_by_us(adapter, None, tmp_path / "out")


MEMORY = """
import json, sys
from pathlib import Path
import torch
from onward.checkpoint.tensorfile import TensorFileWriter, TensorSpec
from onward.checkpoint.save import Adapter
from onward.weights.merge import merge

root, count, size = Path(sys.argv[1]), 48, 1024
(root / "base").mkdir(); (root / "out").mkdir()
specs = [TensorSpec(f"layer.{n}.weight", "F32", (size, size)) for n in range(count)]
with TensorFileWriter(root / "base" / "model.safetensors", specs) as writer:
    for spec in specs:
        writer.write(spec.name, torch.randn(size, size))
(root / "base" / "config.json").write_text("{}")
keys = {f"base_model.model.layer.{n}.lora_{half}.weight": half for n in range(0, count, 2) for half in "AB"}
tensors = {key: torch.randn(2, size) if half == "A" else torch.randn(size, 2) for key, half in keys.items()}
adapter = Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors)
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak()
report = merge(root / "base", root / "out", adapters=[adapter], full={}, to_canonical=lambda name: name)
print(json.dumps({"grown": peak() - before, "tensor": size * size * 4, "merged": report.merged}))
"""


def test_memory_is_bounded_by_one_tensor_not_by_shard_or_model(tmp_path):
    """One file of 192 MiB, tensors of 4 MiB: the peak may grow by a few tensors, and by what torch itself begins."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    result = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert result["merged"] == 24
    assert result["grown"] < 12 * result["tensor"]  # a quarter of the file; the allocator's own share varies
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()


def _sharded(root):
    """A base of two shards with an index."""
    root.mkdir()
    save_file({"a.weight": torch.ones(2, 2)}, root / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"b.weight": torch.ones(2, 2)}, root / "model-00002-of-00002.safetensors", {"format": "pt"})
    weight_map = {f"{name}.weight": f"model-0000{n}-of-00002.safetensors" for n, name in enumerate("ab", start=1)}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text("{}")
    return root


def _set_map(root, **changes):
    path = root / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    value["weight_map"] |= {key.replace("_", "."): file for key, file in changes.items()}
    path.write_text(json.dumps(value))


SECOND = "model-00002-of-00002.safetensors"
BAD_BASES = {
    "a missing shard": (lambda root: (root / SECOND).unlink(), SECOND),
    "a truncated shard": (lambda root: (root / SECOND).write_bytes((root / SECOND).read_bytes()[:-1]), SECOND),
    "a path upwards": (lambda root: _set_map(root, b_weight="../model.safetensors"), r"\.\./model"),
    "a hidden parent": (lambda root: _set_map(root, b_weight=".."), "not a file name"),
    "an absolute path": (lambda root: _set_map(root, b_weight="/etc/passwd"), "/etc/passwd"),
    "a tensor in the wrong shard": (
        lambda root: _set_map(root, b_weight="model-00001-of-00002.safetensors"),
        r"b\.weight",
    ),
    "a tensor that is in no shard": (lambda root: _set_map(root, c_weight=SECOND), r"c\.weight"),
    "no weights": (
        lambda root: [path.unlink() for path in root.glob("model*")],
        r"model\.safetensors",
    ),
    "an index that is a list": (lambda root: (root / "model.safetensors.index.json").write_text("[]"), "weight_map"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_a_base_that_is_not_whole_is_refused_and_the_part_named(tmp_path, case):
    base = _sharded(tmp_path / "base")
    change, message = BAD_BASES[case]
    change(base)
    with pytest.raises((InputError, DamageError), match=message):
        merge_full(base, tmp_path / "out", {"a.weight": torch.zeros(2, 2)})


def test_a_tensor_that_the_index_forgot_is_named(tmp_path):
    base = _sharded(tmp_path / "base")
    peft_side.rewrite(base / SECOND, lambda tensors: tensors.update({"extra": torch.ones(1)}))
    with pytest.raises(DamageError, match="extra"):
        merge_full(base, tmp_path / "out", {"a.weight": torch.zeros(2, 2)})


def test_an_output_of_adapters_is_verified_before_it_is_merged(adapter, tmp_path):
    from onward.checkpoint.manifest import Manifest, write_manifest
    from onward.checkpoint.tensorfile import FileRecord
    from onward.files import digest_file

    files = tuple(
        FileRecord(path.name, path.stat().st_size, digest_file(path, "xxh3")) for path in sorted(adapter.iterdir())
    )
    identity = {"run_id": "r", "stage": "s", "step": 1, "samples_seen": 1, "base": "sha256:0", "names": {}}
    write_manifest(adapter, Manifest(kind="output", files=files, **identity))
    (adapter / "notes.txt").write_text("added later")
    assert peft_side.merged_by_us(adapter, None, tmp_path / "out").merged == 2
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 12', '"lora_alpha": 13'))
    with pytest.raises(DamageError, match=r"adapter_config\.json"):
        peft_side.merged_by_us(adapter, None, tmp_path / "again")
