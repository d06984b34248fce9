"""States that a script assigns or resets in the middle of training under DeepSpeed ZeRO (Guitaricet/relora#10)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress, reset_states
from lightning_sketch.optimizer.assigned import encode_assigned
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.zero.prescribed import Cells, train

pytestmark = pytest.mark.distributed

SHAPES: dict[str, tuple[int, ...]] = {"table": (9, 4), "kept": (3, 2), "alone": (8, 4)}
POLICY = Policy([Rule(name=["*.table.*", "*.alone.*"], exp_avg=BFloat16(), exp_avg_sq=RowWise())])
STAGES = (1, 3)


def _refused(act: Any) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def observe(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    model = Cells(SHAPES)
    groups = [{"params": [model.cells[name].weight for name in names]} for names in (("table", "kept"), ("alone",))]
    optimizer = compress(torch.optim.AdamW(groups, lr=0.1), model, POLICY)
    made = engine(model, optimizer, stage)
    train(made, range(2), rank, world_size)
    first, second = (optimizer.state[flat.tensor] for flat in optimizer.compression.flat)
    tensor = next(iter(optimizer.compression.flat)).tensor
    keys = set(first)
    # Of all layers in the tensor, kept ones too.
    first["exp_avg"] = torch.zeros_like(tensor)
    encode_assigned(optimizer)  # as a step and state_dict do
    cleared = all(not value.any() for key, value in first.items() if key.endswith("].exp_avg"))
    stayed = all(value.any() for key, value in first.items() if key.endswith("].exp_avg_sq_row"))
    found: dict[str, Any] = {"cleared": cleared, "stayed": stayed, "keys": set(first) == keys}
    first["exp_avg"] = torch.zeros(3)
    found["shape"] = _refused(lambda: encode_assigned(optimizer))
    del first["exp_avg"]
    found["part"] = _refused(lambda: reset_states(made, "*table*"))
    found["steps"] = [float(state["step"]) for state in (first, second)]
    reset_states(made, "*alone*")
    train(made, [2], rank, world_size)
    found["after"] = [float(optimizer.state[flat.tensor]["step"]) for flat in optimizer.compression.flat]
    return found


def everything(rank: int, world_size: int) -> dict[int, dict[str, Any]]:
    init_deepspeed(rank, world_size)
    return {stage: observe(rank, world_size, stage) for stage in STAGES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[int, dict[str, Any]]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dense_state_of_a_flat_tensor_is_encoded_for_all_its_layers(ranks, stage):
    for rank in ranks:
        assert rank[stage]["cleared"]
        assert rank[stage]["stayed"]
        assert rank[stage]["keys"]


@pytest.mark.parametrize("stage", STAGES)
def test_one_of_another_shape_is_refused(ranks, stage):
    for rank in ranks:
        assert "its exp_avg in optimizer.state is a tensor of shape [3]" in rank[stage]["shape"]


@pytest.mark.parametrize("stage", STAGES)
def test_layers_are_reset_with_all_that_share_their_step_count(ranks, stage):
    for rank in ranks:
        assert "cells.table.weight cannot be reset without cells.kept.weight" in rank[stage]["part"]
        assert rank[stage]["steps"] == [2, 2]
        assert rank[stage]["after"] == [3, 1]
