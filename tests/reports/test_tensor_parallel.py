"""Tensor parallelism trains as one process does. With FSDP2: fsdp2/test_tensor_parallel.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import AdamW

from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress, decompress, report
from tests.ranks import run_ranks

ROWS, STEPS = 40, 4
HALF = BFloat16(stochastic=False)
#: Equal to one process under row shards, up to the order in which gradients are summed.
POLICY = Policy(
    [
        Rule(role="embedding", first_moment=HALF, second_moment=RowWise()),
        Rule(name="norm.weight", first_moment=HALF, second_moment=HALF),
        Rule(name="up.weight", first_moment=HALF, second_moment=RowWise()),
    ]
)
#: Vocabulary cut by rows, and by columns; with the sequence cut between blocks, and whole.
PLANS = {
    "rows": {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    },
    "columns": {
        "table": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    },
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(ROWS, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, ROWS)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.down(self.up(self.norm(self.table(tokens))).relu()))
        return logits


def trained(model: Any) -> dict[str, Any]:
    """Losses, parameters and the bytes of states here, and dense states after `decompress`."""
    optimizer = compress(AdamW(model.parameters(), lr=0.01, foreach=False), model, POLICY)  # foreach mixes no DTensors
    losses = []
    for step in range(STEPS):
        tokens = torch.randint(ROWS, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    optimizer.load_state_dict(optimizer.state_dict())
    scales = sum(key.endswith("_scale") for state in optimizer.state.values() for key in state)
    held = report(optimizer).state_by_codec["RowWise"] - 8 * scales
    decompress(optimizer)
    moments = optimizer.state[model.table.weight]["exp_avg_sq"]
    tensors = {name: full(param.detach()) for name, param in model.named_parameters()}
    return {"losses": torch.stack(losses), "moments": full(moments), "held": held, **tensors}


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tensor",))
    found: dict[str, Any] = {"one": trained(Net())}
    for name, layout in PLANS.items():
        found[name] = trained(parallelize_module(Net(), mesh, layout))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_rank, 2)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in expected.keys() - {"held"}:
        torch.testing.assert_close(
            found[key], expected[key], rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.distributed
def test_a_vocabulary_cut_by_rows_trains_as_in_one_process(ranks):
    """Its gradient comes replicated, and those of the norm's replicas as sums that are still to be made."""
    for rank in ranks:
        assert_close(rank["rows"], rank["one"])


@pytest.mark.distributed
def test_a_vocabulary_cut_by_columns_trains_alike(ranks):
    """Each rank's row means are of its own columns, so it is not quite the same."""
    for rank in ranks:
        torch.testing.assert_close(rank["columns"]["losses"], rank["one"]["losses"], rtol=2e-2, atol=0)


@pytest.mark.distributed
def test_row_cut_tables_hold_their_share_of_the_states(ranks):
    assert [rank["rows"]["held"] for rank in ranks] == [ranks[0]["one"]["held"] // 2] * 2
