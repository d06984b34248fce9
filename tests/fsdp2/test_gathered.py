"""Gathered checkpoints (``full_state_dict=True``) of another number of ranks, loaded by torch's own function."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Policy, RowWise, Rule, compress, restore
from tests.ranks import run_ranks
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed

FULL = StateDictOptions(full_state_dict=True)
CODECS: dict[str, dict[str, Any]] = {
    "default": {"exp_avg": Drop(), "exp_avg_sq": Factored(floor=1.0)},
    "rows": {"exp_avg": BFloat16(), "exp_avg_sq": RowWise()},
    "sketched rows": {"exp_avg": Drop(), "exp_avg_sq": RowWise(compression=4)},
    "sm3": {"exp_avg": Drop(), "exp_avg_sq": SM3()},
    "sketch": {"exp_avg": CountSketch(3), "exp_avg_sq": CountSketch(3)},
    "synced": {"exp_avg": Drop(), "exp_avg_sq": CountSketch(3, sync=True)},
}
POLICY = Policy([Rule(name=f"tables.{number}.weight", **codecs) for number, codecs in enumerate(CODECS.values())])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(42, 8) for _ in CODECS)
        self.head = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.head(sum(table(words) for table in self.tables)).square().sum()
        return found


def make(world_size: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net()
    if world_size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return model, compress(AdamW(model.parameters(), lr=0.01), model, POLICY)


def step(model: Any, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    words = torch.randint(42, (8,), generator=torch.Generator().manual_seed(number))
    model(words).backward()
    optimizer.step()


def save(rank: int, world_size: int, path: str) -> None:
    model, optimizer = make(world_size)
    for number in range(3):
        step(model, optimizer, number)
    gathered = get_optimizer_state_dict(model, optimizer, options=FULL)
    if rank == 0:
        torch.save(gathered, path)


def held(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """This rank's part of all states."""
    found = {}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            found[f"{name}.{key}"] = (value.to_local() if hasattr(value, "to_local") else value).clone()
    return found


def load(rank: int, world_size: int, path: str) -> dict[str, Any]:
    model, optimizer = make(world_size)
    message = ""
    try:
        set_optimizer_state_dict(model, optimizer, torch.load(path), options=FULL)
    except ValueError as error:
        message = str(error)
    by_torch = held(model, optimizer) if not message else {}
    other, again = make(world_size)
    restore(again, path)
    by_name = held(other, again)
    return {"message": message, "by torch": by_torch, "by restore": by_name}


@functools.cache
def loaded(saved_by: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "gathered.pt"))
        if saved_by == 1:
            save(0, 1, path)
        else:
            run_ranks(save, saved_by, path)
        return run_ranks(load, 2, path)


@pytest.mark.parametrize("saved_by", [2, 3])
def test_another_number_of_ranks_loads_what_restore_does(saved_by):
    for rank in loaded(saved_by):
        assert rank["message"] == ""
        assert rank["by torch"].keys() == rank["by restore"].keys()
        for key, expected in rank["by restore"].items():
            assert_same(rank["by torch"][key], expected, key)


def test_one_process_s_is_refused_on_all_ranks_with_the_way_that_works():
    for rank in loaded(1):
        assert "it was gathered (full_state_dict=True) from another layout" in rank["message"]
        assert "which lightning_sketch.restore loads" in rank["message"]
        assert rank["by restore"]
