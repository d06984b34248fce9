"""The ranks that benchmarks/shards_quality.py simulates in one process compute what gloo's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Adam

from benchmarks.simulated_ranks import SimulatedRanks, Tables
from lightning_sketch import SM3, CountSketch, Drop, Factored, Policy, RowWise, Rule, compress
from tests.ranks import run_ranks

ROWS, DIM, STEPS = 37, 6, 5
SECOND = {
    "factored": Factored(),
    "sketched rows": RowWise(compression=4),
    "rows": RowWise(),
    "SM3": SM3(),
    "sketch": CountSketch(compression=3),
    "synchronised sketch": CountSketch(compression=3, sync=True),
}


def tables() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(ROWS, DIM, generator=generator)) for name in SECOND}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return {name: torch.randn(ROWS, DIM, generator=generator) for name in SECOND}


def make(module: nn.Module) -> Any:
    rules = [Rule(name=f"{name}.*", exp_avg=Drop(), exp_avg_sq=codec) for name, codec in SECOND.items()]
    return compress(Adam(module.parameters(), lr=0.05), module, Policy(rules))


def on_gloo(rank: int, world_size: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    module = Tables(tables(), mesh)
    optimizer = make(module)
    for step in range(STEPS):
        module.take(gradients(step), mesh)
        optimizer.step()
    return {name: part.weight.full_tensor().detach() for name, part in module.named_children()}


def simulated(ranks: int) -> dict[str, Tensor]:
    whole = tables()
    optimizer = SimulatedRanks(whole, ranks, make)
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            whole[name].grad = gradient
        optimizer.step()
    return {name: table.detach() for name, table in whole.items()}


@pytest.mark.distributed
def test_two_simulated_ranks_are_those_of_gloo_bit_for_bit():
    found, expected = simulated(2), run_ranks(on_gloo, 2)[0]
    for name in SECOND:
        assert torch.equal(found[name], expected[name]), name


def test_many_simulated_ranks_are_one_process_where_they_agree():
    found, expected = simulated(8), simulated(1)
    for name in SECOND:
        distance = float((found[name] - expected[name]).norm() / expected[name].norm())
        assert (distance < 1e-6) == (name != "sketch"), (name, distance)
