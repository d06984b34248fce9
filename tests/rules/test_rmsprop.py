"""RMSprop equals torch.optim.RMSprop when its codecs lose nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import RMSprop

from lightning_sketch import CountSketch, Drop, Policy, RowWise, Rule
from tests.rules.oracle import (
    LAZY,
    SHAPES,
    WIDE,
    assert_equals_torch,
    assert_follows_float32,
    converted,
    everywhere,
    feed,
    sparse_gradients,
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


def test_dropped_first_moments_are_neither_centered_nor_moved_by_momentum():
    ours, optimizer = converted(partial(RMSprop, centered=True, momentum=0.9), everywhere(Drop(), WIDE), SHAPES)
    plain, reference = converted(RMSprop, everywhere(second=WIDE), SHAPES)
    for step in range(5):
        torch.manual_seed(step)
        grads = [torch.randn(p.shape) for p in ours.parameters()]
        feed(ours, optimizer, grads), feed(plain, reference, grads)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sparse_gradients_move_and_decay_touched_rows_only(kind):
    """torch refuses them; the reference is torch's formula on the touched rows."""
    model, optimizer = converted(partial(RMSprop, lr=0.01, alpha=0.9, **kind), everywhere(LAZY, LAZY))
    w, v, mean, buffer = model.p0.detach().clone(), *torch.zeros(3, 20, 3)
    for step in range(20):
        grads = sparse_gradients(model, step)
        feed(model, optimizer, grads)
        rows, g = (part := grads[0].coalesce()).indices()[0], part.values()
        v[rows] = 0.9 * v[rows] + 0.1 * g.square()
        mean[rows] = 0.9 * mean[rows] + 0.1 * g
        variance = v[rows] - mean[rows].square() if "centered" in kind else v[rows]
        update = g / (variance.sqrt() + 1e-8)
        if "momentum" in kind:
            update = buffer[rows] = 0.9 * buffer[rows] + update
        w[rows] -= 0.01 * update
        torch.testing.assert_close(model.p0.detach(), w, rtol=1e-5, atol=1e-6)


def test_a_mean_that_exceeds_the_second_moment_does_not_make_nan():
    """Two approximations of one layer can make v - mean^2 negative."""
    policy = Policy([Rule(square_avg=RowWise(), grad_avg=CountSketch(width=2, depth=1))])
    model, optimizer = converted(partial(RMSprop, lr=0.01, centered=True), policy)
    for step in range(20):
        torch.manual_seed(step)
        feed(model, optimizer, [torch.randn(20, 3) * torch.tensor([1.0, 10.0, 100.0]) + 5])
    assert bool(model.p0.isfinite().all())
    assert model.p0.abs().max() < 10
