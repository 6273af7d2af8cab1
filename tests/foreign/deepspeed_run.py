"""Trains with DeepSpeed on CPUs, one process a rank: torchrun THIS DIRECTORY STAGE [trainer | fused]. No dropout.

Over onward's own batches, in fp32; saves after step 6 as DIRECTORY/zero/global_step6 and after the last one as
global_step16, or as Hugging Face's Trainer does, which then drives it.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]


def main(directory: Path, stage: int) -> None:
    import deepspeed
    import torch
    import transformers
    from trainer_run import BATCH, SAVED, STEPS, samples_of

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    decays = [p for n, p in model.named_parameters() if p.dim() > 1]
    spared = [p for n, p in model.named_parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95))
    scheduler = transformers.get_scheduler("cosine", optimizer, 2, STEPS)
    config = {
        "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH // ranks, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    samples, _ = samples_of(directory)
    for step in range(STEPS):
        mine = samples[step * BATCH : (step + 1) * BATCH]
        targets = sum(int((sample["labels"][1:] != -100).sum()) for sample in mine)
        mine = mine[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
        loss = 0.0
        for sample in mine:  # the mean over all ranks' target tokens: DeepSpeed divides by the number of ranks
            row = {key: value[None] for key, value in sample.items()}
            logits = engine(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
            part = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), row["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            loss = loss + part * ranks / targets
        engine.backward(loss)
        engine.step()
        if step + 1 in (SAVED, STEPS):
            engine.save_checkpoint(str(directory / "zero"), tag=f"global_step{step + 1}")


def by_trainer(directory: Path, stage: int, kind: str) -> None:
    import fused_run
    import trainer_run

    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {
        **dict.fromkeys(auto, "auto"),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if kind == "fused":
        fused_run.train(directory, "internlm2", deepspeed=config)
    else:
        trainer_run.train(directory, "full", deepspeed=config)


if __name__ == "__main__":
    place, stage, *kind = sys.argv[1:]
    by_trainer(Path(place), int(stage), *kind) if kind else main(Path(place), int(stage))
