"""Weights out of DeepSpeed's flat slices: cut here as DeepSpeed cuts them, put together again by onward."""

from __future__ import annotations

import pytest
import torch

from onward.errors import OnwardError
from onward.foreign.zero import master_pieces

SHAPES = [{"a.weight": (5, 3), "a.bias": (5,), "b.weight": (2, 2, 3)}, {"c.weight": (7,)}]


def zero_directory(path, stage: int, ranks: int) -> dict[str, torch.Tensor]:
    """A directory with random masters, and what they are by name."""
    path.mkdir()
    generator = torch.Generator().manual_seed(ranks)
    tensors = {n: torch.randn(shape, generator=generator) for group in SHAPES for n, shape in group.items()}
    flats = [[] for _ in range(ranks)]
    for group in SHAPES:
        if stage == 3:
            slices = [[] for _ in range(ranks)]
            for name in group:
                size = -(-tensors[name].numel() // ranks)
                padded = torch.nn.functional.pad(tensors[name].flatten(), (0, size * ranks - tensors[name].numel()))
                for rank in range(ranks):
                    slices[rank].append(padded[rank * size : (rank + 1) * size])
            parts = [torch.cat(mine) for mine in slices]
        else:
            parts = torch.cat([tensors[name].flatten() for name in group]).tensor_split(ranks)
        for rank, part in enumerate(parts):
            flats[rank].append(part.clone())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    module = {name: tensor.bfloat16() for name, tensor in tensors.items()} | {"frozen.weight": torch.ones(2)}
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in SHAPES]
    for rank in range(ranks):
        if rank == 0 or stage == 3:
            file = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            held = {} if stage == 3 else module
            torch.save({"module": held, "param_shapes": shapes, "dp_world_size": ranks, "global_steps": 5}, path / file)
        state = {"zero_stage": stage, key: flats[rank], "partition_count": ranks}
        torch.save({"optimizer_state_dict": state}, path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tensors


@pytest.mark.parametrize("stage, ranks", [(1, 1), (2, 3), (3, 1), (3, 2), (3, 4)])
def test_masters_come_back_bit_for_bit(tmp_path, stage, ranks):
    tensors = zero_directory(tmp_path / "zero", stage, ranks)
    pieces, model = master_pieces(tmp_path / "zero")
    assert model["global_steps"] == 5
    for name, tensor in tensors.items():
        assert pieces[name].dtype == "F32"
        assert pieces[name].shape == tuple(tensor.shape)
        assert torch.equal(pieces[name].read(), tensor)
    if stage < 3:
        assert torch.equal(pieces["frozen.weight"].read(), torch.ones(2))


def test_a_missing_rank_is_an_error(tmp_path):
    zero_directory(tmp_path / "zero", 2, 3)
    (tmp_path / "zero" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(OnwardError, match="2 of 3 ranks"):
        master_pieces(tmp_path / "zero")


def test_without_the_optimizer_the_weights_are_those_of_training(tmp_path):
    tensors = zero_directory(tmp_path / "zero", 2, 1)
    (tmp_path / "zero" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    pieces, _ = master_pieces(tmp_path / "zero")
    assert torch.equal(pieces["a.weight"].read(), tensors["a.weight"].bfloat16())
