"""Adagrad equals torch.optim.Adagrad with an exact codec; with `SM3` it is the optimizer SM3."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import Adagrad, Adam

from lightning_sketch import SM3, Drop, Policy, RowWise, Rule
from tests.rules.oracle import (
    LAZY,
    WIDE,
    assert_equals_torch,
    assert_follows_float32,
    converted,
    everywhere,
    feed,
    gradients,
    sparse_gradients,
)

OPTIONS = [
    {}, {"weight_decay": 0.1}, {"maximize": True}, {"lr_decay": 0.3}, {"initial_accumulator_value": 0.5},
    {"lr": torch.tensor(0.05, dtype=torch.float64), "eps": 1e-3},
    {"foreach": True, "weight_decay": 0.1, "lr_decay": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torch_under_every_option(options, dtype):
    assert_equals_torch(partial(Adagrad, **{"lr": 0.1} | options), everywhere(second=WIDE), dtype=dtype)


def test_float16_parameters_lose_one_rounding_a_step():
    assert_follows_float32(partial(Adagrad, lr=0.01, eps=1e-4), everywhere(second=WIDE), torch.float16)


@pytest.mark.parametrize(
    "options", [{}, {"maximize": True, "lr_decay": 0.1, "initial_accumulator_value": 0.5}], ids=str
)
def test_equals_torch_on_sparse_gradients(options):
    assert_equals_torch(
        partial(Adagrad, lr=0.1, **options), everywhere(second=LAZY),
        shapes=[(30, 4), (9, 2, 3), (12, 1)], grads=sparse_gradients, steps=25,
    )  # fmt: skip


@pytest.mark.parametrize("sparse", [False, True])
def test_sm3_is_the_paper(sparse):
    """nu = min(row, column) + g^2, w -= lr g / sqrt(nu), row and column are the maxima of nu; over the touched rows."""
    model, optimizer = converted(partial(Adagrad, lr=0.1, eps=0.0), everywhere(second=SM3()), [(9, 4)])
    w = model.p0.detach().double()
    row, column = torch.zeros(9, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for step in range(10):
        grads = sparse_gradients(model, step, hits=5) if sparse else gradients(model, step)
        feed(model, optimizer, grads)
        g = grads[0].to_dense().double()
        touched = (g != 0).any(dim=1)
        nu = torch.minimum(row[:, None], column) + g.square()
        w -= 0.1 * torch.where(g == 0, 0.0, g / nu.sqrt())
        row = torch.where(touched, nu.amax(dim=1), row)
        column = torch.maximum(column, nu[touched].amax(dim=0)) if sparse else nu.amax(dim=0)
        torch.testing.assert_close(model.p0.double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_sm3_momentum_is_an_ema_of_the_preconditioned_gradient(sparse):
    """Algorithm with momentum: m = b m + (1 - b) g / sqrt(nu), w -= lr m. `nu` is taken from a run without momentum."""
    bare, plain = converted(partial(Adagrad, lr=1.0, eps=0.0), everywhere(second=SM3()), [(9, 4)])
    model, optimizer = converted(partial(Adagrad, lr=0.1, eps=0.0), everywhere(second=SM3(momentum=0.8)), [(9, 4)])
    w, m = model.p0.detach().clone(), torch.zeros(9, 4)
    for step in range(10):
        grads = sparse_gradients(model, step, hits=5) if sparse else gradients(model, step)
        before = bare.p0.detach().clone()
        feed(bare, plain, grads), feed(model, optimizer, grads)
        touched = (grads[0].to_dense() != 0).any(dim=1, keepdim=True) if sparse else torch.ones(9, 1, dtype=torch.bool)
        m = torch.where(touched, 0.8 * m + 0.2 * (before - bare.p0.detach()), m)
        w -= 0.1 * torch.where(touched, m, 0.0)
        torch.testing.assert_close(model.p0.detach(), w, rtol=1e-4, atol=1e-5)


def test_sm3_momentum_takes_the_place_of_adams_first_moment():
    policy = Policy([Rule(exp_avg=Drop(), exp_avg_sq=SM3(momentum=0.9))])
    model, optimizer = converted(partial(Adam, lr=0.1), policy, [(9, 4)])
    before = model.p0.detach().clone()
    feed(model, optimizer, [torch.full((9, 4), 3.0)])
    torch.testing.assert_close(before - model.p0.detach(), torch.full((9, 4), 0.1 * 0.1))
    with pytest.raises(ValueError, match=r"SM3\(momentum=...\) is the layer's momentum, so exp_avg must be dropped"):
        converted(partial(Adam, lr=0.1), everywhere(second=SM3(momentum=0.9)))


def test_row_wise_adagrad_is_the_recommenders_formula():
    model, optimizer = converted(partial(Adagrad, lr=0.1, eps=1e-8), everywhere(second=RowWise()))
    w, rows = model.p0.detach().clone(), torch.zeros(20)
    for step in range(10):
        grads = sparse_gradients(model, step)
        feed(model, optimizer, grads)
        g = grads[0].to_dense()
        rows += g.square().mean(dim=1)
        w -= 0.1 * g / (rows.sqrt()[:, None] + 1e-8)
        torch.testing.assert_close(model.p0.detach(), w, rtol=1e-5, atol=1e-6)
