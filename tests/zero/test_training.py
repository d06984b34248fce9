"""ZeRO-0/1/2/3 against one process that steps the same gradients: what is exact, and what each part of a table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, RMSprop

from lightning_sketch import compress
from tests import tiny
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.zero.prescribed import (
    TABLES,
    Cells,
    assemble,
    assert_alone,
    assert_kept,
    compressed,
    held,
    one_process,
    policy,
    short,
    table_pieces,
    train,
)

pytestmark = pytest.mark.distributed

ADAGRAD = tiny.Case(Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1})
RMSPROP = tiny.Case(RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5, "weight_decay": 0.1})
MOMENTUM = tiny.Case(SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1})
STEPS = 6


@dataclass(frozen=True)
class Run:
    """One configuration of DeepSpeed and an optimizer."""

    stage: int
    optimizer: tiny.Case = tiny.ADAMW
    per_layer: bool = False  # a parameter group for each

    def __str__(self) -> str:
        return f"stage {self.stage} {self.optimizer}{' group per layer' if self.per_layer else ''}"


RUNS = [
    *[Run(stage) for stage in (0, 1, 2, 3)],
    *[Run(stage, per_layer=True) for stage in (1, 3)],
    *[Run(stage, optimizer) for stage in (2, 3) for optimizer in (tiny.ADAM, ADAGRAD, RMSPROP, MOMENTUM)],
]
#: One rank, where nothing may differ, two, and four, where every layer is cut more often: each cut once.
FEW = [*[Run(stage) for stage in (1, 2, 3)], *[Run(stage, per_layer=True) for stage in (1, 3)]]
RUNS_ON = {1: FEW, 2: FEW, 3: RUNS, 4: FEW}


def observe(rank: int, world_size: int, run: Run) -> dict[str, Any]:
    model = Cells()
    params = list(model.parameters())
    groups: Any = [{"params": [p]} for p in params] if run.per_layer else params
    optimizer = compress(run.optimizer.make(groups), model, policy())
    made = engine(model, optimizer, run.stage)
    train(made, range(STEPS), rank, world_size)
    client = getattr(made.optimizer, "optimizer", made.optimizer)
    return {"tensors": held(made), "same optimizer": client is optimizer}


def everything(rank: int, world_size: int) -> list[dict[str, Any]]:
    init_deepspeed(rank, world_size)
    return [observe(rank, world_size, run) for run in RUNS_ON[world_size]]


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], list[list[dict[str, Any]]]]:
    """What `everything` returned on each rank. Processes are started once for each world size."""
    return cache(partial(run_ranks, everything))


@pytest.fixture(scope="module")
def single() -> Callable[[Run, int], tuple[Any, Any]]:
    """The run in one process."""
    made: dict[tuple[str, int], tuple[Any, Any]] = {}

    def of(run: Run, world_size: int) -> tuple[Any, Any]:
        key = (str(run.optimizer), world_size)
        if key not in made:
            made[key] = one_process(run.optimizer, range(STEPS), world_size)
        return made[key]

    return of


def tensors(ranks: Any, world_size: int, run: Run) -> list[list[dict[str, Any]]]:
    return [rank[RUNS_ON[world_size].index(run)]["tensors"] for rank in ranks(world_size)]


each_world = pytest.mark.parametrize("world_size", RUNS_ON)
each_run = pytest.mark.parametrize(
    ("world_size", "run"),
    [pytest.param(number, run, id=f"{number}-{run}") for number, runs in RUNS_ON.items() for run in runs],
)


@each_world
def test_deepspeed_steps_the_converted_optimizer_itself(ranks, world_size):
    for rank in ranks(world_size):
        for run, result in zip(RUNS_ON[world_size], rank, strict=True):
            assert result["same optimizer"], str(run)


@each_run
def test_bfloat16_and_kept_layers_train_as_in_one_process(ranks, single, world_size, run):
    found = assemble(tensors(ranks, world_size, run))
    assert torch.equal(found["bf16"], single(run, world_size)[0].cells["bf16"].weight)
    assert_kept(found, single(run, world_size))


@each_run
def test_row_means_are_those_of_one_process_where_no_border_cuts_the_row(ranks, single, world_size, run):
    found = assemble(tensors(ranks, world_size, run))["rows"]
    wanted = single(run, world_size)[0].cells["rows"].weight
    uncut = torch.ones(len(found), dtype=torch.bool)
    for rank in tensors(ranks, world_size, run):
        for _, _, _, (_, _, shard) in table_pieces(rank, "rows"):
            uncut[shard.row_offset] &= shard.part_shape is None
    assert uncut.sum() >= len(uncut) - world_size
    assert torch.equal(found[uncut], wanted[uncut])


@each_run
def test_every_piece_of_a_table_is_trained_and_kept_as_if_it_were_alone(ranks, single, world_size, run):
    _, optimizer = single(run, world_size)
    compared = sum(assert_alone(r, optimizer, range(STEPS), world_size) for r in tensors(ranks, world_size, run))
    total = sum(torch.Size(TABLES[name]).numel() for name in compressed(optimizer))
    assert compared == (total if run.stage else total * world_size)


@each_world
def test_steps_are_counted_once_for_each_engine_step(ranks, world_size):
    for rank in ranks(world_size):
        for run, result in zip(RUNS_ON[world_size], rank, strict=True):
            if run.optimizer is not MOMENTUM:  # which counts none where torch itself steps
                assert {int(t["state"]["step"]) for t in result["tensors"] if t["segments"]} == {STEPS}, str(run)


@each_world
def test_a_flat_tensor_of_kept_layers_only_is_torchs_own(ranks, single, world_size):
    run = Run(1, per_layer=True)
    model, optimizer = single(run, world_size)
    for rank in tensors(ranks, world_size, run):
        for tensor in rank:
            for fqn, start, length, offset in tensor["segments"]:
                if short(fqn) in TABLES:
                    continue
                assert set(tensor["state"]) == {"step", "exp_avg", "exp_avg_sq"}
                wanted = optimizer.state[model.get_parameter(fqn)]
                for name in ("exp_avg", "exp_avg_sq"):
                    state: Tensor = tensor["state"][name][start : start + length]
                    torch.testing.assert_close(state, wanted[name].flatten()[offset : offset + length])
