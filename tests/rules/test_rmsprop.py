"""RMSprop equals torch.optim.RMSprop when its codecs lose nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import RMSprop

from lightning_sketch import CountSketch, Policy, RowWise, Rule
from tests.rules.oracle import (
    WIDE,
    assert_equals_torch,
    assert_follows_float32,
    converted,
    everywhere,
    feed,
)

KINDS = [{}, {"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.9}]
OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"alpha": 0.5, "eps": 1e-3, "lr": torch.tensor(0.02, dtype=torch.float64)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_torch_under_every_option(kind, options, dtype):
    assert_equals_torch(partial(RMSprop, **{"lr": 0.01} | kind | options), everywhere(WIDE, WIDE), dtype=dtype)


def test_float16_parameters_lose_one_rounding_a_step():
    assert_follows_float32(partial(RMSprop, lr=0.001, eps=1e-2), everywhere(second=WIDE), torch.float16)


def test_a_mean_that_exceeds_the_second_moment_does_not_make_nan():
    """Two approximations of one layer can make v - mean^2 negative."""
    policy = Policy([Rule(square_avg=RowWise(), grad_avg=CountSketch(width=2, depth=1))])
    model, optimizer = converted(partial(RMSprop, lr=0.01, centered=True), policy)
    for step in range(20):
        torch.manual_seed(step)
        feed(model, optimizer, [torch.randn(20, 3) * torch.tensor([1.0, 10.0, 100.0]) + 5])
    assert bool(model.p0.isfinite().all())
    assert model.p0.abs().max() < 10


def test_a_sketch_of_updates_cannot_be_agreed_on_before_the_step():
    policy = Policy([Rule(momentum_buffer=CountSketch(sync=True))])
    with pytest.raises(ValueError, match=r"p0: RMSprop's momentum is of updates, .* without sync=True"):
        converted(partial(RMSprop, lr=0.01, momentum=0.9), policy)
