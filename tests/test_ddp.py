"""Plain PyTorch DistributedDataParallel: replicas stay bit-identical, parameters and states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Policy, RowWise, Rule, compress, report
from tests.ranks import run_ranks
from tests.tiny import assert_same, snapshot

STEPS, ROWS, DIM = 80, 60, 6
POLICY = Policy(
    [
        Rule(name="tables.0.*", exp_avg=CountSketch(compression=3), exp_avg_sq=CountSketch(compression=3)),
        Rule(name="tables.1.*", exp_avg=Drop(), exp_avg_sq=CountSketch(compression=3, lazy=True)),
        Rule(name="tables.2.*", exp_avg=BFloat16(), exp_avg_sq=RowWise(compression=4)),
        Rule(name="tables.3.*", exp_avg=CountSketch(2, update="paper"), exp_avg_sq=SM3()),
        Rule(name="hidden.weight", exp_avg=BFloat16(), exp_avg_sq=Factored()),
    ]
)


class Model(nn.Module):
    """The sum of four embeddings predicts the next token."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, DIM, sparse=sparse) for _ in range(4))
        self.hidden = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, ROWS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(sum(table(tokens) for table in self.tables)).tanh())


def replica(rank: int, world_size: int, sparse: bool) -> dict:
    """Train on this rank's own data; all parameters and states."""
    model = DistributedDataParallel(Model(sparse))
    optimizer = compress(torch.optim.AdamW(model.parameters(), lr=0.05), model, POLICY)
    data = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(STEPS):
        tokens = (torch.rand(8, generator=data) ** 3 * ROWS).long()  # some rows are frequent
        loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % ROWS)
        optimizer.zero_grad()
        loss.backward()
        assert model.module.tables[0].weight.grad.is_sparse == sparse
        optimizer.step()
        losses.append(float(loss.detach()))
    return {
        "training": snapshot(model.module, optimizer),
        "loss": (losses[0], losses[-1]),
        "codecs": sorted(report(optimizer).state_by_codec),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_are_bit_identical_after_many_steps(world_size, sparse):
    first, *others = run_ranks(replica, world_size, sparse)
    assert first["codecs"] == ["BFloat16", "CountSketch", "Factored", "Keep", "RowWise", "SM3"]
    assert first["loss"][1] < first["loss"][0] / 2
    for other in others:
        assert other["loss"] != first["loss"]  # its data were its own
        assert_same(other["training"], first["training"])
