"""`compress` says where a sketch is divided by rows, which costs quality."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.optim import AdamW

from lightning_sketch import BFloat16, Codec, CountSketch, Policy, RowWise, Rule, compress
from tests.ranks import run_ranks

CASES: dict[str, tuple[Codec, int]] = {  # the second moment's codec, and the dimension that is sharded
    "sketch": (CountSketch(compression=4), 0),
    "sketched rows": (RowWise(compression=4), 0),
    "one sketch of all ranks": (CountSketch(compression=4, sync=True), 0),
    "rows": (RowWise(), 0),
    "wide sketch": (CountSketch(width=100), 0),
    "sketch by columns": (CountSketch(compression=4), 1),
}


def announced(rank: int, world_size: int) -> list[str]:
    """The cases for which something was said on this rank."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("lightning_sketch").addHandler(Collect())
    found = []
    for name, (codec, dim) in CASES.items():
        model: Any = nn.Embedding(40, 6)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda _, dim=dim: Shard(dim))
        messages.clear()
        compress(AdamW(model.parameters()), model, Policy([Rule(name="*", exp_avg=BFloat16(), exp_avg_sq=codec)]))
        if any(message.startswith("weight: sharded by rows") for message in messages):
            found.append(name)
    return found


@pytest.mark.distributed
def test_sketches_divided_by_rows_are_announced_once():
    assert run_ranks(announced, 2) == [["sketch"], []]
