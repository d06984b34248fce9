"""Adam, AdamW and SparseAdam equal torch.optim when their codecs lose nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import Adam, AdamW, SparseAdam

from tests.rules.oracle import (
    LAZY,
    WIDE,
    assert_equals_torch,
    assert_follows_float32,
    everywhere,
    sparse_gradients,
)

POLICIES = {
    "second": everywhere(second=WIDE),
    "first": everywhere(first=WIDE),
    "both": everywhere(WIDE, WIDE),
}
OPTIONS = [
    {}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}, {"betas": (0.0, 0.5), "eps": 1e-3},
    {"betas": (0.95, 0.99), "lr": torch.tensor(0.02, dtype=torch.float64)}, {"foreach": True},
    {"fused": True, "weight_decay": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_equals_torch_under_every_option(cls, options, dtype):
    assert_equals_torch(partial(cls, **{"lr": 0.01} | options), POLICIES["both"], dtype=dtype)


@pytest.mark.parametrize("moment", ["first", "second"])
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_equals_torch_with_one_moment_exact_and_one_kept(cls, moment):
    assert_equals_torch(partial(cls, lr=0.01, weight_decay=0.1), POLICIES[moment])


def test_float16_parameters_lose_one_rounding_a_step():
    assert_follows_float32(partial(AdamW, lr=0.01, weight_decay=0.1, eps=1e-4), POLICIES["both"], torch.float16)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=str)
def test_sparse_adam_equals_torch_on_sparse_gradients(options):
    assert_equals_torch(
        partial(SparseAdam, lr=0.01, **options), everywhere(LAZY, LAZY), shapes=[(30, 4), (9, 2, 3), (12, 1)],
        grads=sparse_gradients, steps=25,
    )  # fmt: skip


def test_a_schedule_of_the_learning_rate_is_followed():
    def make(params):
        optimizer = AdamW(params, lr=0.1, weight_decay=0.1)
        rates = iter([0.1, 0.01, 0.0, 0.02])
        optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=next(rates)))
        return optimizer

    assert_equals_torch(make, POLICIES["both"], steps=4)


def test_groups_have_their_own_hyperparameters():
    def make(params):
        first, *others = params
        return AdamW([{"params": [first], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": others}], weight_decay=0.3)

    assert_equals_torch(make, POLICIES["both"])
