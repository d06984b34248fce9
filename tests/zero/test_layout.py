"""What each rank holds: the bytes of its states, and the table that says which rows are where."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch import SM3, CountSketch, Drop, Factored, Policy, RowWise, Rule, compress
from tests import tiny
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.zero.prescribed import SHAPES, Cells, policy, train

pytestmark = pytest.mark.distributed

ROWS, COLUMNS = 12_000, 16
CODECS: dict[str, dict[str, Any]] = {
    "dense": {},
    "CountSketch": {"second_moment": CountSketch(compression=20)},
    "both moments sketched": {"first_moment": CountSketch(compression=5), "second_moment": CountSketch(compression=20)},
    "RowWise": {"second_moment": RowWise()},
    "RowWise sketched": {"second_moment": RowWise(compression=4)},
    "SM3": {"second_moment": SM3()},
    "Factored": {"second_moment": Factored()},
    "BFloat16": tiny.CODECS["bfloat16"],
}


class Table(nn.Module):
    """One large table and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.zeros(ROWS, COLUMNS), freeze=False)
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sum() + self.bias.sum()


def optimizer_of(model: nn.Module, codecs: dict[str, Any]) -> Any:
    optimizer = tiny.ADAMW.make(model.parameters())
    chosen = Policy([Rule(role="embedding", min_rows=10_000, **{"first_moment": Drop()} | codecs)])
    return compress(optimizer, model, chosen) if codecs else optimizer


def nbytes(optimizer: Any) -> int:
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def state_bytes(stage: int, codecs: dict[str, Any]) -> int:
    model = Table()
    optimizer = optimizer_of(model, codecs)
    made = engine(model, optimizer, stage)
    made.backward(made(torch.arange(8)))
    made.step()
    return nbytes(optimizer)


def shown(rank: int, world_size: int, stage: int, **zero: Any) -> str:
    model = Cells()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, policy())
    train(engine(model, optimizer, stage, **zero), [0], rank, world_size)
    return str(optimizer.compression.flat)


def everything(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    return {
        "bytes": {(stage, name): state_bytes(stage, codecs) for stage in (2, 3) for name, codecs in CODECS.items()},
        "tables": {stage: shown(rank, world_size, stage) for stage in (1, 3)},
    }


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], list[dict[str, Any]]]:
    """What `everything` returned on each rank. Processes are started once for each world size."""
    return cache(partial(run_ranks, everything))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_each_rank_holds_its_share_of_the_states(ranks, world_size, stage, name):
    model = Table()
    optimizer = optimizer_of(model, CODECS[name])
    model(torch.arange(8)).backward()
    optimizer.step()
    found = [rank["bytes"][stage, name] for rank in ranks(world_size)]
    if name == "RowWise sketched":  # shared: all of it on each rank, once more for each row that a border cuts
        assert max(found) <= nbytes(optimizer) * 3.01
        return
    cut_rows = 2 * (4 * COLUMNS + 16) if name == "Factored" else 0  # at both ends, with the means of all columns
    assert max(found) <= nbytes(optimizer) * (1 / world_size + 0.01) + cut_rows
    assert sum(found) <= nbytes(optimizer) * 1.01 + world_size * cut_rows


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_table_of_a_rank_names_its_rows(ranks, world_size):
    first, *_, last = (result["tables"][3] for result in ranks(world_size))
    rows, columns = divmod(-(-41 * 8 // world_size), 8)  # of "sketch", 41 x 8, ZeRO-3 gives each rank a share
    assert first.startswith("ZeRO-3: what this rank's flat tensors hold")
    assert f"0:{rows} of 41" in first
    assert f"{rows}:{rows + 1} of 41" in first  # the row that the border cuts
    assert f" 0:{columns} " in first
    assert ":41 of 41" in last
    assert "exp_avg_sq: CountSketch(compression=2)" in first
    assert "cells.first.weight ... cells.scalar.weight" in first
    assert "kept as they are" in first
    assert "padding, " in last
    front, *_, back = (result["tables"][1] for result in ranks(world_size))
    assert "cells.sketch.weight" in front
    assert "0:41 of 41" in front
    assert "cells.sketch.weight" not in back
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert f"padding, {-total % (2 * world_size)} elements" in back
