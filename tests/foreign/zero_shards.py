"""ZeRO directories as DeepSpeed writes them, of any number of ranks, made by splitting: what its own runs left was
compared with the same (stages 0 to 3, 1 to 8 ranks, DeepSpeed 0.19)."""

import math
from collections import OrderedDict

import torch

SLOTS = ("master", "exp_avg", "exp_avg_sq")


def make_tensors(seed=0):
    """Parameter → master and moments, of awkward sizes."""
    torch.manual_seed(seed)
    shapes = {"a.weight": (13, 7), "a.bias": (13,), "norm.weight": (13,), "b.weight": (13, 13), "scale": (1,)}
    return {name: {slot: torch.randn(shape) for slot in SLOTS} for name, shape in shapes.items()}


def write_zero(directory, tensors, stage, ranks, *, groups=None, frozen=None, elastic=False, padded=1, sub_groups=False,
               skipped=0, config=None, without=()):  # fmt: skip
    """Write `tensors` after 7 steps. `groups`: lists of names; `padded`: each parameter is aligned to so many numbers;
    `frozen`: name → tensor; `sub_groups`: ZeRO 3 keeps a flat group for each parameter; `without`: ranks left out."""
    directory.mkdir(parents=True)
    groups = groups or [list(tensors)]
    owners = [[n] for names in groups for n in names] if sub_groups else groups
    frozen = frozen or {}
    whole = {"buffer": torch.arange(3.0), **{n: t["master"].to(torch.bfloat16) for n, t in tensors.items()}, **frozen}
    shapes = [OrderedDict((n, tensors[n]["master"].shape) for n in names) for names in owners]
    paddings = [[(-math.prod(s)) % padded for s in group.values()] for group in shapes]
    for rank in range(ranks):
        parts = list(zip(owners, paddings, strict=True))
        flat = {s: [_slice(tensors, names, s, stage, rank, ranks, pad) for names, pad in parts] for s in SLOTS}
        members, described = 0, []
        for number, names in enumerate(groups):
            count = len(names) if sub_groups else 1
            group = {"lr": 1e-3, "initial_lr": 1e-2 * (number + 1), "betas": (0.9, 0.95), "eps": 1e-8}
            owned = list(range(members, members + count))
            described.append({**group, "weight_decay": 0.1 / (number + 1), "params": owned})
            members += count
        state = {
            k: {"step": torch.tensor(7.0), "exp_avg": flat["exp_avg"][k], "exp_avg_sq": flat["exp_avg_sq"][k]}
            for k in range(len(owners))
        }
        inner = {"state": state, "param_groups": described}
        held = {"zero_stage": stage, "partition_count": ranks, "ds_version": "0.19.8", "overflow": False}
        if stage == 3:
            held |= {"optimizer_state_dict": inner, "fp32_flat_groups": flat["master"]}
        else:
            held |= {
                "base_optimizer_state": list(state.values()) if elastic else inner,
                "single_partition_of_fp32_groups": flat["master"],
                "param_alignment_paddings": paddings,
            }
        told = {"global_steps": 7 + skipped, "skipped_steps": skipped, "dp_world_size": ranks, "mp_world_size": 1,
                "ds_version": "0.19.8", "buffer_names": ["buffer"], "param_shapes": shapes, "shared_params": {},
                "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in frozen.items())}  # fmt: skip
        if rank == 0 or stage == 3:
            module = {n: torch.empty(0) if n != "buffer" else t for n, t in whole.items()} if stage == 3 else whole
            fragments = {n: _share(t, rank, ranks) if stage == 3 else t for n, t in frozen.items()}
            file = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save({"module": module, "frozen_param_fragments": fragments, **told}, directory / file)
        if rank not in without:
            file = directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": held, "ds_config": config or {}, "ds_version": "0.19.8"}, file)
    return directory


def _slice(tensors, names, slot, stage, rank, ranks, paddings):
    if stage == 3:
        return torch.cat([_share(tensors[name][slot], rank, ranks) for name in names])
    parts = []
    for name, padding in zip(names, paddings, strict=True):
        parts += [tensors[name][slot].flatten(), torch.full((padding,), 7.0)]
    flat = torch.cat(parts)
    size = -(-len(flat) // (2 * ranks)) * 2
    mine = flat[rank * size : (rank + 1) * size]
    if slot == "master":  # saved without the padding behind the last parameter
        return mine.clone()
    return torch.cat([mine, torch.zeros(size - len(mine))])


def _share(tensor, rank, ranks):
    size = -(-tensor.numel() // ranks)
    mine = tensor.flatten()[rank * size : (rank + 1) * size]
    return torch.cat([mine, torch.zeros(size - len(mine), dtype=tensor.dtype)])
