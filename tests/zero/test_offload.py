"""DeepSpeed's offload in what `test_engine` and `test_checkpoint` leave: the same bits as without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lightning_sketch import compress
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.tiny import ADAMW, assert_same
from tests.zero.prescribed import Cells, held, policy, train

pytestmark = pytest.mark.distributed

OPTIMIZER = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
BOTH = OPTIMIZER | {"offload_param": {"device": "cpu", "pin_memory": False}}
SCALED = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "hysteresis": 1}}


@dataclass(frozen=True)
class Setup:
    """One configuration of DeepSpeed; `overflow` has the second step overflow on one rank."""

    stage: int
    dtype: str = "fp32"
    more: dict[str, Any] = field(default_factory=dict)
    offload: dict[str, Any] = field(default_factory=lambda: OPTIMIZER)
    overflow: bool = False

    def __str__(self) -> str:
        return f"stage {self.stage} {self.dtype} {' '.join((*self.more, *self.offload))}"


SETUPS = [
    *[Setup(stage, more={"gradient_accumulation_steps": 3}) for stage in (2, 3)],
    *[Setup(stage, "bf16") for stage in (2, 3)],
    *[Setup(stage, "fp16", SCALED, overflow=True) for stage in (2, 3)],
    Setup(3, "bf16", offload=BOTH),
]


def trained(rank: int, world_size: int, setup: Setup, **offload: Any) -> Any:
    """What a rank holds after four steps."""
    model = Cells()
    optimizer = compress(ADAMW.make(model.parameters()), model, policy())
    made = engine(model, optimizer, setup.stage, setup.dtype, setup.more, **offload)
    for step in range(4):
        train(made, [step], rank, world_size, scale=1e30 if setup.overflow and (step, rank) == (1, 0) else 1)
    return [without_padding(tensor) for tensor in held(made)]


def without_padding(tensor: dict[str, Any]) -> dict[str, Any]:
    """With zeros in place of it: ZeRO-3 leaves there what was in memory."""
    values = tensor["values"]
    covered = torch.zeros_like(values, dtype=torch.bool)
    for _, start, length, _ in tensor["segments"]:
        covered[start : start + length] = True
    return tensor | {"values": values.where(covered, 0.0)}


def twin_flow(rank: int, world_size: int) -> str:
    """What offloading a part of the optimizer raises, where DeepSpeed steps the rest by an AdamW of its own."""
    model = Cells()
    optimizer = compress(ADAMW.make(model.parameters()), model, policy())
    try:
        engine(model, optimizer, 3, offload_optimizer={"device": "cpu", "ratio": 0.5})
    except AssertionError as error:
        return str(error)
    return ""


def everything(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    pairs = [(trained(rank, world_size, s), trained(rank, world_size, s, **s.offload)) for s in SETUPS]
    return {"setups": pairs, "twin flow": twin_flow(rank, world_size)}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_training_with_offload_is_that_without_bit_for_bit(ranks, setup):
    for rank in ranks:
        without, offloaded = rank["setups"][SETUPS.index(setup)]
        assert_same(offloaded, without)
        steps = {float(tensor["state"]["step"]) for tensor in offloaded if tensor["segments"]}
        assert steps == {3.0 if setup.overflow else 4.0}


def test_deepspeed_refuses_to_offload_a_part_of_any_optimizer_but_its_own(ranks):
    for rank in ranks:
        assert "Hybrid Optimizer Only Supports DeepSpeedCPUAdam" in rank["twin flow"]
