"""The loss in chunks against torch's own autograd over whole logits, and what it takes of memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, Qwen2Config

from onward.model import head
from onward.model.adapters import inject
from onward.model.forward import evaluating, loss_sum, score
from onward.model.selection import LoraLayer

VOCABULARY, WIDTH = 500, 32
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.1, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "qwen2, tied": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "gemma2, capped": Gemma2Config(**SIZE, final_logit_softcapping=2.0),
    "cohere, scaled": CohereConfig(**SIZE, logit_scale=0.25),
    "granite, divided": GraniteConfig(**SIZE, logits_scaling=4.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    monkeypatch.setattr(head, "FEWEST", 1)


def batch(rows=3, length=20):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 12:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make(config, *, trained="all"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if trained == "lora on the head":
        inject(model, [LoraLayer("lm_head", 4, 8.0, 0.0), LoraLayer("model.layers.0.mlp.up_proj", 4, 8.0, 0.0)], 1, "s")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif trained == "all but the head":
        model.get_output_embeddings().requires_grad_(False)
    return model.train()


def plain(model, inputs):
    """The loss as anybody would write it: transformers' logits, whole, and torch's autograd."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_like_plain(model, inputs, scale=1.0, rtol=1e-6, atol=2e-6):
    """Same dropout, same loss; gradients as far apart as sums in another order are."""
    torch.manual_seed(9)
    expected = plain(model, inputs)
    theirs = gradients(model, expected * scale)
    torch.manual_seed(9)
    found = loss_sum(model, inputs)
    ours = gradients(model, found * scale)
    assert found.item() == pytest.approx(expected.item(), rel=rtol)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        bound = atol * max(1.0, gradient.abs().max().item()) * max(scale, 1.0)
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=bound), name


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradients_are_those_of_whole_logits(config):
    model = make(CONFIGS[config])
    assert_like_plain(model, batch(), scale=1 / 44)
    assert model not in head._odd


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trained", ["lora on the head", "all but the head"])
def test_whatever_of_the_head_trains(trained):
    assert_like_plain(make(CONFIGS["llama"], trained=trained), batch())


def test_where_one_chunk_would_do_the_model_makes_its_logits_itself(monkeypatch):
    model, inputs = make(CONFIGS["llama"]), batch()  # 16 columns of its 3 rows have a target
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 3 * 16 * VOCABULARY)
    assert not head.is_large(model, 48) and head.is_large(model, 49)
    with Largest() as largest:
        loss_sum(model, inputs)
    assert largest.elements == 48 * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_far_off_as_it_is_with_whole_logits(dtype):
    model, inputs = make(CONFIGS["llama"]), batch()
    torch.manual_seed(9)
    exact = gradients(model, plain(model, inputs))
    scale = 1024.0 if dtype == torch.float16 else 1.0
    errors = []
    for loss in (plain, loss_sum):
        torch.manual_seed(9)
        with torch.autocast("cpu", dtype=dtype):
            value = loss(model, inputs)
        found = gradients(model, value * scale)
        errors.append({name: (found[name] / scale - exact[name]).norm() / exact[name].norm() for name in exact})
    theirs, ours = errors
    assert all(ours[name] <= 1.5 * theirs[name] + 1e-3 for name in exact)


def test_the_same_bits_every_time():
    model, inputs = make(CONFIGS["llama"]), batch()
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append(gradients(model, loss_sum(model, inputs)))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class Odd(torch.nn.Module):
    """A model that does something else to its logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **arguments):
        output = self.model(**arguments)
        output.logits = output.logits + 1.5 * output.logits.sin()
        return output


def test_a_model_that_does_more_after_its_head_makes_its_logits_itself():
    model, inputs = Odd(make(CONFIGS["llama"])).train(), batch()
    for _ in range(2):  # the first time it is found out, and no draw is lost on that
        assert_like_plain(model, inputs)
    assert head._odd[model]


def test_no_tensor_holds_all_logits():
    model, inputs = make(CONFIGS["llama"]), batch()
    for loss, is_whole in ((plain, True), (loss_sum, False)):
        with Largest() as largest:
            loss(model, inputs).backward()
        assert (largest.elements >= 44 * VOCABULARY) == is_whole
    with Largest() as largest, evaluating(model):
        score(model, inputs)
    assert largest.elements < 44 * VOCABULARY


def test_measuring_gives_the_same(monkeypatch):
    model, inputs = make(CONFIGS["gemma2, capped"]), batch()
    with evaluating(model):
        in_chunks = score(model, inputs)
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2**26)
        whole = score(model, inputs)
    assert in_chunks == (pytest.approx(whole[0], rel=1e-6), *whole[1:])
