"""The prototype in `benchmarks.row_floor`: without a floor it is the package's RowWise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adagrad, RMSprop, SparseAdam

import lightning_sketch as ls
from benchmarks.row_floor import FlooredRows

#: A stock class, and what makes the prototype the same.
STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (
        lambda params: SparseAdam(params, lr=0.1, betas=(0.0, 0.999)),
        {"decay": 0.999, "corrects_bias": True},
    ),
    "adagrad": (lambda params: Adagrad(params, lr=0.1, eps=1e-8), {"decay": 1.0, "corrects_bias": False}),
    "rmsprop": (lambda params: RMSprop(params, lr=0.1, alpha=0.999), {"decay": 0.999, "corrects_bias": False}),
}


def trained(make: Any) -> torch.Tensor:
    torch.manual_seed(0)
    table = nn.Embedding(50, 8, sparse=True)
    optimizer = make(table)
    for _ in range(20):
        table(torch.randint(50, (6,))).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return table.weight.detach()


@pytest.mark.parametrize("family", STOCK)
def test_without_a_floor_it_is_row_wise(family):
    stock, sums = STOCK[family]
    policy = ls.Policy([ls.Rule(role="embedding", second_moment=ls.RowWise())])
    expected = trained(lambda table: ls.compress(stock(table.parameters()), table, policy))
    found = trained(lambda table: FlooredRows(table.parameters(), lr=0.1, floor=0.0, **sums))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_floor_holds_back_the_first_step_of_a_rare_row():
    def moved(floor: float) -> list[float]:
        weight = nn.Parameter(torch.zeros(10, 4))
        optimizer = FlooredRows([weight], lr=1.0, eps=0.0, decay=0.999, corrects_bias=False, floor=floor)
        values = torch.tensor([[1.0] * 4, [0.01] * 4])  # a frequent row's, a rare one's
        weight.grad = torch.sparse_coo_tensor(torch.tensor([[3, 7]]), values, (10, 4), check_invariants=True)
        optimizer.step()
        return weight[:, 0].tolist()

    free, held = moved(0.0), moved(10.0)
    assert free[3] == pytest.approx(free[7], rel=1e-5)  # the sign alone
    assert abs(held[7]) < 0.02 * abs(held[3])
    assert abs(held[3]) == pytest.approx(abs(free[3]) / (2 + 1e-4) ** 0.5, rel=1e-3)  # ten means of ten rows: one more
