"""Write docs/checkpoints.md: what onward can do with other tools' checkpoints, by what `inspect` says of real ones.

.venv/bin/python docs/make_checkpoints_md.py

The checkpoints are those of ../shared/samples, beside the repository.
"""

from __future__ import annotations

from pathlib import Path

from onward.runs.inspect import inspect

SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"
ROWS = [  # tool, format, sample
    ("Hugging Face Trainer + PEFT", "`checkpoint-N/`, `.bin`", "qwen-7b-lora-ckpt/checkpoint-6"),
    ("Trainer + PEFT over an NF4 base", "`checkpoint-N/`, `.bin`", "qwen-vl-qlora-ckpt/checkpoint-6"),
    ("XTuner, first stage of a LLaVA", "`iter_N.pth`", "xtuner-llava-pth/pretrain_iter_4.pth"),
    ("XTuner, second stage", "`iter_N.pth`", "xtuner-llava-pth/iter_6.pth"),
    ("XTuner, weights alone", "a state dict, `.pth`", "xtuner-llava-pth/plain_state_dict.pth"),
    ("XTuner, a projector alone", "a state dict, `.pth`", "xtuner-llava-pth/pretrained_plain.pth"),
    ("XTuner, InternVL", "`iter_N.pth`", "xtuner-internvl-pth/iter_5.pth"),
    ("XTuner + DeepSpeed ZeRO 2", "`iter_N.pth/`, 1 rank", "xtuner-llava-iter-dir/iter_5.pth"),
    ("XTuner + DeepSpeed ZeRO 1", "`iter_N.pth/`, 1 rank", "xtuner-llava-iter-dir-zero1/iter_5.pth"),
    ("XTuner + DeepSpeed ZeRO 2", "`iter_N.pth/`, 2 ranks", "xtuner-llava-iter-dir-zero2-2ranks/iter_5.pth"),
    ("XTuner, its release", "parts, safetensors", "xtuner-llava-internlm2-parts/release"),
    ("XTuner, its release", "parts, `.bin`", "xtuner-llava-internlm2-parts-bin/release"),
    ("Qwen's own code", "model, safetensors", "qwen-7b-tiny"),
    ("Qwen-VL's own code", "model, `.bin`", "qwen-vl-tiny"),
    ("AutoGPTQ", "model in 4 bits", "qwen-vl-int4-tiny"),
    ("InternLM2's own code", "model, `.bin`", "internlm2-tiny"),
    ("InternVL's own code", "model, safetensors", "internvl2-tiny"),
]
HEAD = """# Other tools' checkpoints

`onward inspect PATH` says what something is, which tool wrote it, what it holds, whether training can go on from it exactly, what is missing for that and
why, and which command comes next. It reads headers alone and runs nothing: pickles are read by a small machine that imports and calls nothing
(`src/onward/foreign/pickle_machine.py`), safetensors headers are not believed until their offsets fit the file, and nothing leads out of the directory.

## Going on with a training

```
onward inspect out/checkpoint-500
onward import out/checkpoint-500 --plan plan.yaml --run runs/plan --accept data_order
onward run plan.yaml --run runs/plan
```

The plan describes the whole training, the part that lies behind included: same model, same trained modules, same `steps` or `epochs`, same schedule. `import` makes a
run whose first stage has a checkpoint at the source's step; from there it is a run like any other.

| what | goes on |
|---|---|
| weights that train | bit for bit; from a ZeRO directory the fp32 masters, not the rounded copies; where mmengine's EMAHook saved an average in their place, those that train (`--accept ema`) |
| optimizer | AdamW, also in 8 bits, Adafactor, Lion, SGD: all that it remembers, by parameter name. Tools that number parameters (Trainer, mmengine) are read in the order of the model, LoRA+ groups included, and every shape must fit; otherwise it is refused. Of another optimizer (amsgrad, Adam with weight decay, …) the reason is told, and `--accept optimizer` starts a stage from the weights |
| schedule | the learning rates of the next steps are printed beside the source's, and a few later ones compared too; where they differ, where the plan has no such schedule, or where the source does not say: `--accept schedule` |
| steps | those in which the weights moved: DeepSpeed and Trainer count steps that overflowed under fp16 as well, `--accept steps`. The loss scale goes on |
| precision | compared; weights or moments that the source keeps in bf16 or fp16 are kept in fp32 here: `--accept precision` |
| frozen weights | not taken over: those of the plan's model must be the same, bit for bit, where the source holds them |
| learning rate and weight decay (of each parameter, where groups differ), betas, eps, momentum, clipping, batch size, adapters' dropout | compared with what the source states; each difference is named and wants its `--accept` |
| loss of a step | onward's is the mean over the step's target tokens. Trainer before 4.46, XTuner and DeepSpeed average micro-batches or ranks; Trainer may smooth labels or add noise: where that differs, `--accept loss` |
| vocabulary | XTuner's LLaVA has no token for images, a model that is put together here has one: adapters on the head get a row for it, the mean of the others, its moments too: `--accept vocabulary` |
| place in the data | the step's place in onward's own order of the plan's data: `--accept data_order`, always, since no tool's order is onward's |
| random state | no: dropout draws from the seed, stage and step |

Held by tests, fp32, dropout 0, the same batches: ten steps further the weights are those of the tool itself within 1e-6. Trainer 5 (full, part of a model, LoRA with
`modules_to_save`, rsLoRA, DoRA, LoRA+, patterns of ranks; each optimizer and schedule of above; safetensors, `.bin`, shards), DeepSpeed ZeRO 1, 2 and 3 of one and two ranks, DeepSpeed inside Trainer, and files as XTuner lays them out, whose other side is torch's AdamW. Of fused layers Trainer 5 with PEFT (DeepSpeed inside it too) on models that have
Qwen's and InternLM2's own layers (adapters with whole embeddings and head, ranks and alphas by layer, full training), and Trainer 4.40 with Qwen's and Qwen-VL's own code: two steps after its checkpoint, its weights and gradient norms.

A source without an optimizer's state starts a new stage *from weights*: its adapters and whole tensors are folded into the plan's model, and the stage begins at step 0.

DeepSpeed's directories: ZeRO 1, 2 and 3 of any number of ranks, with frozen parameters, several groups, round-robin or elastic; without ZeRO in fp32; universal ones. Refused, with the reason: tensor- or pipeline-parallel
DeepSpeed and its experts; without ZeRO in 16 bits, where the masters have no names; a shard set that is not whole; a projector of another depth than 2; FSDP's and DCP's sharded optimizer states (DCP is told, with torch's own command that makes one file of it).

### Models that are converted, adapters on fused layers

Trainings of models that [`onward import`](importing.md) converts go on in what it makes of the base: rows of weights and of moments go where the layers went, by the layout's own order where the
tool numbers parameters. Qwen's `c_attn`, InternLM2's `wqkv` and InternViT's `attn.qkv` are one layer there and three here; an adapter on one has a single A, whose gradient is the sum of the three's.
In the plan `shared_a: [q_proj, k_proj, v_proj]` keeps it single ([what that means](adapters.md#a-shared-a)). `inspect` prints the `model` and the `train` that the plan must have:

```
  the plan's model: DIR, DIR being what onward import qwen-7b --out DIR makes
  the plan's train: {language_model: {mode: lora, rank: 8, alpha: 16, targets: [q_proj, k_proj, v_proj, o_proj, up_proj, gate_proj], shared_a: [q_proj, k_proj, v_proj]}}
```

A plan without `shared_a` is refused with the line that is missing. The states of AdamW, SGD and Lion are taken apart by rows; Adafactor's and those in 8 bits are not, and say so.

No file of PEFT's says that the base was quantised. A base in GPTQ's bits is unpacked by `onward import` to the very values that it trained on. What bitsandbytes' NF4 made of a fused layer differs a little from what it
makes of the three (`mode: qlora`), where it quantised twice, since the scales' mean is taken over a layer: 0.3 % of the weights on the sample, where NF4 itself takes 9 %.

## What `inspect` says of real ones

This table is made by `docs/make_checkpoints_md.py` from small checkpoints that the tools themselves wrote; a test compares it.

| tool | format | it is | optimizer | goes on exactly | next |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(_row(*row) for row in ROWS) + "\n"


def _row(tool: str, form: str, sample: str) -> str:
    path = SAMPLES / sample
    found = inspect(path)
    command = (found.next_command or "none").replace(str(path), path.name)
    holds = "yes" if "optimizer" in found.facts else "no"
    exactly = "yes" if found.continues_exactly else "no"
    typed, _, note = command.partition("  # ")
    shown = f"`{typed}`" + (f" ({note})" if note else "")
    if "the plan's train" in found.facts:
        shown += " with the `model` and `train` that `inspect` prints"
    return f"| {tool} | {form} | {found.kind} | {holds} | {exactly} | {shown} |"


if __name__ == "__main__":
    Path(__file__).with_name("checkpoints.md").write_text(page(), encoding="utf-8")
