"""An estimated first moment is clamped to what exact moments allow."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sketch import CountSketch, Keep, Policy, Rule, compress
from lightning_sketch.rules.base import bounded, moment_bound

EXACT: Any = SimpleNamespace(bounded=False)
BOUNDED: Any = SimpleNamespace(bounded=True)  # a sketched one


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
    found = bounded(m, v, moment_bound(BOUNDED, beta1, beta2))
    torch.testing.assert_close(found, m, rtol=1e-9, atol=0)


def test_the_bound_is_reached_by_a_gradient_that_grows_as_fast_as_the_emas_weigh():
    beta1, beta2 = 0.9, 0.999
    m = v = torch.zeros(1, dtype=torch.float64)
    for t in range(400):
        g = (beta2 / beta1) ** t
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    clamped = bounded(2 * m, v, moment_bound(BOUNDED, beta1, beta2))
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


def test_at_beta1_of_0_the_bound_is_that_of_one_gradient():
    assert moment_bound(BOUNDED, 0.0, 0.999) == pytest.approx(1 / math.sqrt(1 - 0.999))
    assert moment_bound(BOUNDED, 0.0, 0.0) == 1  # v is g**2


@pytest.mark.parametrize(("beta1", "beta2"), [(0.99, 0.9), (0.9, 0.0), (0.0, 1.0)])
def test_there_is_no_bound(beta1, beta2):
    """The first moment remembers longer, or the second takes up nothing."""
    assert moment_bound(BOUNDED, beta1, beta2) == 0
    m, v = torch.tensor([1e6]), torch.tensor([1e-12])
    assert bounded(m, v, 0.0) is m


def test_gradients_and_exact_first_moments_are_not_bounded():
    assert moment_bound(None, 0.9, 0.999) == 0
    assert moment_bound(EXACT, 0.9, 0.999) == 0
