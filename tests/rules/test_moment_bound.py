"""What a step divides is clamped to what exact second moments allow, where those of a codec may be smaller."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, RMSprop, SparseAdam

from lightning_sketch import BFloat16, CountSketch, Drop, Factored, Keep, Policy, Rule, compress
from lightning_sketch.rules.base import bounded, moment_bound
from tests.kernels.fused_cases import by_reference
from tests.rules.oracle import converted, everywhere, feed

EXACT: Any = SimpleNamespace(bounded=False)
BOUNDED: Any = SimpleNamespace(bounded=True)  # a second moment, or a sketched first one
FACTORED = Factored(bounded=True)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    gradients=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    beta1=st.sampled_from([0.0, 0.5, 0.9, 0.95]),
    beta2=st.sampled_from([0.95, 0.99, 0.999]),
)
def test_true_moments_of_one_gradient_are_never_clamped(gradients, beta1, beta2):
    m = v = torch.zeros(1, dtype=torch.float64)
    for g in gradients:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    found = bounded(m, v, moment_bound(BOUNDED, EXACT, beta1, beta2))
    torch.testing.assert_close(found, m, rtol=1e-9, atol=0)


def test_the_bound_is_reached_by_a_gradient_that_grows_as_fast_as_the_emas_weigh():
    beta1, beta2 = 0.9, 0.999
    m = v = torch.zeros(1, dtype=torch.float64)
    for t in range(400):
        g = (beta2 / beta1) ** t
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    clamped = bounded(2 * m, v, moment_bound(BOUNDED, EXACT, beta1, beta2))
    torch.testing.assert_close(clamped, m, rtol=1e-2, atol=0)


def test_a_rare_row_does_not_take_the_momentum_of_a_frequent_one():
    table = nn.Embedding(2, 1)
    nn.init.zeros_(table.weight)
    optimizer = torch.optim.Adam(table.parameters(), lr=1.0)
    policy = Policy([Rule(role="embedding", exp_avg=CountSketch(width=1, depth=1), exp_avg_sq=Keep())])
    compress(optimizer, table, policy)
    for _ in range(20):  # both rows share one bucket; row 1's own gradient is a millionth
        table.weight.grad = torch.tensor([[1.0], [1e-6]])
        optimizer.step()
    assert table.weight[1].abs() < 20 * 8  # without the bound: millions


def test_without_a_first_moment_the_bound_is_that_of_one_gradient():
    assert moment_bound(None, BOUNDED, 0.9, 0.999) == pytest.approx(1 / math.sqrt(1 - 0.999))
    assert moment_bound(None, BOUNDED, 0.0, 0.0) == 1  # v is g**2


@pytest.mark.parametrize(("beta1", "beta2"), [(0.99, 0.9), (0.9, 0.0), (0.0, 1.0)])
def test_there_is_no_bound(beta1, beta2):
    """The first moment remembers longer, or the second takes up nothing."""
    assert moment_bound(BOUNDED, BOUNDED, beta1, beta2) == 0
    m, v = torch.tensor([1e6]), torch.tensor([1e-12])
    assert bounded(m, v, 0.0) is m


def test_estimates_that_are_exact_or_no_smaller_are_not_bounded():
    assert moment_bound(None, EXACT, 0.9, 0.999) == 0
    assert moment_bound(EXACT, EXACT, 0.9, 0.999) == 0


WITH_MOMENTUM = 7.3 * math.sqrt(0.001) / 0.1  # both corrections of the first step
#: An optimizer, the policy, and how far its exact step can go, in learning rates.
FAR: dict[str, tuple[Any, Policy, float]] = {
    "adam, no first moment": (partial(Adam, eps=0.0), everywhere(Drop(), FACTORED), 1.0),
    "adam, first moment kept": (partial(Adam, eps=0.0), everywhere(Keep(), FACTORED), WITH_MOMENTUM),
    "adam, first moment rounded": (partial(Adam, eps=0.0), everywhere(BFloat16(), FACTORED), WITH_MOMENTUM),
    "rmsprop": (partial(RMSprop, eps=0.0), everywhere(second=FACTORED), 10.0),
    "adagrad": (partial(Adagrad, eps=0.0), everywhere(second=FACTORED), 1.0),
}  # fmt: skip


def outliers() -> Tensor:
    """Each row has one large element, of a column where the others' are small: far from a product ``[30, 40]``."""
    g = torch.full((30, 40), 1e-4)
    g[torch.arange(30), torch.arange(30)] = 1.0
    return g


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", FAR)
def test_no_element_goes_further_than_by_its_exact_second_moment(name, kernels):
    make, policy, most = FAR[name]
    model, optimizer = converted(partial(make, lr=1.0), policy, [(30, 40)])
    before = model.p0.detach().clone()
    with nullcontext() if kernels else by_reference():
        feed(model, optimizer, [outliers()])
    moved = (model.p0.detach() - before).abs().max()
    assert 0.5 * most < moved <= 1.001 * most  # without the bound: over five times that


def test_a_bounded_step_is_the_same_of_sparse_and_of_dense_gradients():
    def moved(sparse: bool) -> Tensor:
        table = nn.Embedding(30, 40, sparse=sparse)
        nn.init.zeros_(table.weight)
        optimizer = (SparseAdam if sparse else Adam)(table.parameters(), lr=1.0, eps=1e-12)
        compress(
            optimizer,
            table,
            Policy([Rule(role="embedding", first_moment=Drop(), second_moment=FACTORED)]),
        )
        table.weight.grad = outliers().to_sparse(1) if sparse else outliers()
        optimizer.step()
        return table.weight.detach()

    torch.testing.assert_close(moved(sparse=True), moved(sparse=False), rtol=1e-3, atol=0)


def test_a_variance_may_be_any_part_of_the_square():
    """Centered RMSprop of a gradient that stays the same: by the bound of an uncentered one it would not grow."""
    model, optimizer = converted(
        partial(RMSprop, lr=1.0, eps=0.0, centered=True), everywhere(Keep(), FACTORED), [(30, 40)]
    )
    for _ in range(700):
        before = model.p0.detach().clone()
        feed(model, optimizer, [torch.ones(30, 40)])
    assert (model.p0.detach() - before).abs().max() > 15  # alpha is 0.99: the bound would be 10
