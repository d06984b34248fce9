"""SGD with momentum equals torch.optim.SGD when its codec loses nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.rules.oracle import (
    LAZY,
    WIDE,
    assert_equals_torch,
    assert_follows_float32,
    everywhere,
)

OPTIONS = [
    {}, {"dampening": 0.3}, {"nesterov": True}, {"weight_decay": 0.1}, {"nesterov": True, "weight_decay": 0.1},
    {"maximize": True, "dampening": 0.9}, {"lr": torch.tensor(0.05, dtype=torch.float64)},
    {"foreach": True}, {"fused": True},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torch_under_every_option(options, dtype):
    make = partial(SGD, **{"lr": 0.01, "momentum": 0.9} | options)
    # torch's own SGD differs from itself by a few ulp between foreach and not, and 0.9^t / (1 - 0.9) amplifies it
    assert_equals_torch(make, everywhere(first=WIDE), dtype=dtype)


def test_float16_parameters_lose_one_rounding_a_step():
    assert_follows_float32(partial(SGD, lr=0.001, momentum=0.9), everywhere(first=WIDE), torch.float16)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"dampening": 0.5}], ids=str)
def test_equals_torch_on_sparse_gradients_of_the_same_rows(options):
    """torch's sparse buffer moves every row that was ever touched: no difference if those are the same each time."""

    def same_rows(model: nn.Module, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.tensor([[7, 2, 7, 0]])
        return [
            torch.sparse_coo_tensor(rows, torch.randn(4, *p.shape[1:], generator=generator), p.shape)
            for p in model.parameters()
        ]

    make = partial(SGD, lr=0.05, momentum=0.9, **options)
    assert_equals_torch(make, everywhere(first=LAZY), shapes=[(9, 4), (8, 2, 2)], grads=same_rows)
