"""The pieces that all update rules share."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_sketch import CountSketch, Drop, RowWise
from lightning_sketch.rules.base import safe_divide
from lightning_sketch.rules.layer_step import LayerStep
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding import base as sharding_base
from lightning_sketch.sharding.gradient import RowGradient
from tests.rules.oracle import WIDE, Params, converted, everywhere, feed


def test_safe_divide_is_zero_where_nothing_was_ever_seen():
    found = safe_divide(torch.tensor([0.0, 3.0, 4.0]), torch.tensor([0.0, 1e-8, 2.0]), torch.tensor([0.0, 0.0, 4.0]))
    assert found.tolist() == [0, 0, 2]


def test_safe_divide_broadcasts_a_row_scalar_and_leaves_its_arguments_alone():
    numerator, v = torch.ones(2, 3), torch.tensor([[0.0], [4.0]])
    torch.testing.assert_close(safe_divide(numerator, v.sqrt() + 1, v), torch.tensor([[0.0] * 3, [1 / 3] * 3]))
    assert bool((numerator == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, torch.tensor([1, 4])], ids=["dense", "sparse"])
def test_apply_shrinks_then_steps_at_the_blocks_rows(dtype, rows):
    shard = Shard((6, 2), 0, 6)
    param, update = torch.ones(6, 2, dtype=dtype), torch.full((6 if rows is None else 2, 2), 3.0)
    layer = _layer(param, RowGradient(shard, rows, update.to(dtype)))
    for block in layer.gradient.blocks:
        layer.apply(block, update[block.span], lr=0.25, decay_factor=0.5)
    expected = torch.ones(6, 2)
    expected[slice(None) if rows is None else rows] = 0.5 - 0.75
    assert torch.equal(param.float(), expected)


def test_gradients_are_never_modified():
    for maximize in (False, True):
        model, optimizer = converted(partial(Adam, lr=0.1, weight_decay=0.5, maximize=maximize), everywhere(WIDE, WIDE))
        model.p0.grad = torch.randn(20, 3)
        before = model.p0.grad.clone()
        optimizer.step()
        assert torch.equal(model.p0.grad, before)


@pytest.mark.parametrize("flag", ["amsgrad", "differentiable"])
def test_flags_that_no_rule_implements_are_refused_with_the_layers_name(flag):
    model = Params([(4, 2)])
    with pytest.raises(ValueError, match=rf"{flag}=True is not supported for compressed layers, and p0 is one"):
        converted(partial(Adam, **{flag: True}), everywhere(second=RowWise()))
    optimizer = Adam(model.parameters(), **{flag: True})
    assert type(optimizer) is Adam


def test_a_flag_set_later_is_refused_before_anything_changes():
    model, optimizer = converted(Adam, everywhere(second=RowWise()))
    before = model.p0.detach().clone()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        feed(model, optimizer, [torch.ones(20, 3)])
    assert torch.equal(model.p0, before)
    assert not optimizer.state


@pytest.mark.parametrize("make", [AdamW, Adagrad, RMSprop, partial(SGD, lr=0.01, momentum=0.9)], ids=str)
def test_a_step_in_blocks_is_a_step_at_once(make, monkeypatch):
    """Every rule must add all blocks before it reads the first: rows of different blocks share buckets."""
    runs = []
    for block_numel in (1 << 18, 7):
        monkeypatch.setattr(sharding_base, "BLOCK_NUMEL", block_numel)
        model, optimizer = converted(make, everywhere(CountSketch(width=4), CountSketch(width=4)))
        for step in range(5):
            torch.manual_seed(step)
            feed(model, optimizer, [torch.randn(20, 3)])
        runs.append(model.p0.detach())
    torch.testing.assert_close(*runs)


def test_a_zero_gradient_changes_nothing_before_the_first_real_one():
    for make in (Adam, Adagrad, partial(RMSprop, centered=True), partial(SGD, lr=0.1, momentum=0.9)):
        model, optimizer = converted(make, everywhere(CountSketch(width=4), RowWise()))
        before = model.p0.detach().clone()
        feed(model, optimizer, [torch.zeros(20, 3)])
        assert torch.equal(model.p0, before)


@pytest.mark.parametrize("first", [Drop(), WIDE], ids=repr)
def test_unused_parameters_are_left_alone(first):
    model, optimizer = converted(partial(AdamW, weight_decay=0.5), everywhere(first, RowWise()), [(4, 2), (5, 3)])
    before = model.p1.detach().clone()
    model.p0.grad = torch.ones(4, 2)
    optimizer.step()
    assert torch.equal(model.p1, before)
    assert model.p1 not in optimizer.state


def _layer(param: torch.Tensor, gradient: RowGradient) -> LayerStep:
    return LayerStep(
        param=param,
        gradient=gradient,
        states={},
        momentum=None,
        momentum_beta=0.0,
        numbers=None,
        step=1,
        dtype=torch.float32,
    )
