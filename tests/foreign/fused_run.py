"""Models whose layers are fused as Qwen's and InternLM2's own code has them, trained by PEFT and Trainer here and now.

Written apart from onward and from transformers' classes: the same arithmetic under the originals' names, so that
checkpoints and the numbers in optimizer.pt are what those tools leave.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import legacy_models as legacy
import trainer_run

NAMES = {
    "qwen": {
        "body": "transformer", "embed": "wte", "blocks": "h", "norm": "ln_f", "head": "lm_head",
        "block": ("ln_1", "attn", "ln_2", "mlp"), "attention": ("c_attn", "c_proj"),
        "mlp": ("w1", "w2", "c_proj"), "gate": "w2", "up": "w1", "down": "c_proj",
    },
    "internlm2": {
        "body": "model", "embed": "tok_embeddings", "blocks": "layers", "norm": "norm", "head": "output",
        "block": ("attention", "feed_forward", "attention_norm", "ffn_norm"), "attention": ("wqkv", "wo"),
        "mlp": ("w1", "w3", "w2"), "gate": "w1", "up": "w3", "down": "w2",
    },
}  # fmt: skip


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, kind: str, c) -> None:
        super().__init__()
        self.kind, self.c = kind, c
        self.heads, self.kv = c.num_attention_heads, c.num_key_value_heads
        self.size = c.hidden_size // self.heads
        fused, out = NAMES[kind]["attention"]
        bias = kind == "qwen" or c.attention_bias
        setattr(self, fused, nn.Linear(c.hidden_size, (self.heads + 2 * self.kv) * self.size, bias=bias))
        setattr(self, out, nn.Linear(c.hidden_size, c.hidden_size, bias=kind != "qwen" and c.attention_bias))

    def forward(self, x, tables):
        fused, out = (getattr(self, name) for name in NAMES[self.kind]["attention"])
        rows, length, _ = x.shape
        if self.kind == "qwen":
            q, k, v = (part.view(rows, length, self.heads, self.size) for part in fused(x).chunk(3, -1))
        else:
            parts = fused(x).view(rows, length, self.kv, self.heads // self.kv + 2, self.size)
            q, k, v = (
                parts[..., :-2, :].reshape(rows, length, self.heads, self.size),
                parts[..., -2, :],
                parts[..., -1, :],
            )
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = (part * tables[0] + turned(part) * tables[1] for part in (q, k))
        k, v = (part.repeat_interleave(self.heads // self.kv, 1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # padded on the right: no token sees it
        return out(mixed.transpose(1, 2).reshape(rows, length, -1))


def turned(x):
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


class Mlp(nn.Module):
    def __init__(self, kind: str, c) -> None:
        super().__init__()
        self.names = NAMES[kind]
        for name in self.names["mlp"]:
            sizes = (c.hidden_size, c.intermediate_size)
            setattr(self, name, nn.Linear(*(sizes if name != self.names["down"] else sizes[::-1]), bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, self.names[name]) for name in ("gate", "up", "down"))
        return down(F.silu(gate(x)) * up(x))


class Block(nn.Module):
    def __init__(self, kind: str, c) -> None:
        super().__init__()
        self.kind = kind
        made = {"attn": Attention, "attention": Attention, "mlp": Mlp, "feed_forward": Mlp}
        for name in NAMES[kind]["block"]:
            setattr(self, name, made[name](kind, c) if name in made else Norm(c.hidden_size, c.rms_norm_eps))

    def forward(self, x, tables):
        order = ("ln_1", "attn", "ln_2", "mlp")
        if self.kind == "internlm2":
            order = ("attention_norm", "attention", "ffn_norm", "feed_forward")
        before, attention, behind, mlp = (getattr(self, name) for name in order)
        x = x + attention(before(x), tables)
        return x + mlp(behind(x))


class Fused(nn.Module):
    """The whole, of the configuration of the native model that it is."""

    def __init__(self, kind: str, c) -> None:
        super().__init__()
        self.c, self.names = c, NAMES[kind]
        body = nn.Module()
        setattr(body, self.names["embed"], nn.Embedding(c.vocab_size, c.hidden_size))
        setattr(body, self.names["blocks"], nn.ModuleList(Block(kind, c) for _ in range(c.num_hidden_layers)))
        setattr(body, self.names["norm"], Norm(c.hidden_size, c.rms_norm_eps))
        setattr(self, self.names["body"], body)
        setattr(self, self.names["head"], nn.Linear(c.hidden_size, c.vocab_size, bias=False))

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **_):
        body = getattr(self, self.names["body"])
        size = self.c.hidden_size // self.c.num_attention_heads
        speeds = self.c.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.arange(input_ids.shape[1])[:, None] * speeds
        angles = torch.cat([angles, angles], -1)
        tables = (angles.cos(), angles.sin())
        x = getattr(body, self.names["embed"])(input_ids)
        for block in getattr(body, self.names["blocks"]):
            x = block(x, tables)
        logits = getattr(self, self.names["head"])(getattr(body, self.names["norm"])(x))
        if labels is None:
            return {"logits": logits}
        targets = labels[:, 1:].reshape(-1)
        count = num_items_in_batch if num_items_in_batch is not None else int((targets != -100).sum())
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets, reduction="sum") / count
        return {"loss": loss, "logits": logits}


TRAIN = {
    "qwen": "{language_model: {mode: lora, rank: 4, alpha: 6, targets: [q_proj, k_proj, v_proj, o_proj, up_proj, "
    "gate_proj], shared_a: [q_proj, k_proj, v_proj]}, embed_tokens: {mode: full}, lm_head: {mode: full}}",
    "internlm2": "{language_model: {mode: lora, rank: 4, alpha: 6, rank_pattern: {down_proj: 2}, "
    "alpha_pattern: {down_proj: 5}, use_rslora: true, shared_a: [q_proj, k_proj, v_proj]}}",
    "internlm2 full": "{language_model: {mode: full}}",
}
ADAPTERS = {
    "qwen": {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"], "modules_to_save": ["wte", "lm_head"]},
    "internlm2": {
        "target_modules": ["wqkv", "wo", "w1", "w2", "w3"], "use_rslora": True,
        "rank_pattern": {"w2": 2}, "alpha_pattern": {"w2": 5},
    },
}  # fmt: skip


def make_place(directory: Path, kind: str) -> Path:
    """`theirs`, the foreign model; `model`, what onward makes of it; data and the plan."""
    import tiny

    from onward.foreign.layouts.convert import import_model
    from onward.model.shapes import parameter_shapes

    directory.mkdir(parents=True)
    torch.manual_seed(2)
    getattr(legacy, kind.split()[0])(directory / "theirs", scale=None)
    import_model(directory / "theirs", directory / "model", shapes_of=parameter_shapes)
    tiny.text_data(directory / "data.jsonl", rows=trainer_run.ROWS)
    output = "merged" if "full" in kind else "adapters"
    plan = trainer_run.PLAN.format(train=TRAIN[kind], steps=trainer_run.STEPS, output=output)
    (directory / "plan.yaml").write_text(plan)
    return directory


def train(directory: Path, kind: str, **more: object) -> Path:
    """Train all steps as the plan says, with Trainer on the original layout."""
    import peft
    import transformers
    from safetensors.torch import load_file

    name = kind.split()[0]
    model = Fused(name, transformers.AutoConfig.from_pretrained(directory / "model"))
    model.load_state_dict(load_file(directory / "theirs/model.safetensors"))
    native = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert float((model(input_ids=ids)["logits"] - native(input_ids=ids).logits).abs().max()) < 1e-5
    if kind in ADAPTERS:
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **ADAPTERS[kind]))
    return trainer_run.fit(model, directory, **more)
