"""``found_inf`` and ``grad_scale`` set by hand: compressed layers follow torch's fused kernels.

After ``test_grad_scaling_autocast_fused_optimizers`` of torch's own tests.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_sketch import BFloat16, RowWise, compress
from tests.tiny import EXACTLY, Tiny, assert_same, give_gradients, on_table, snapshot

FUSED = [(Adam, {}), (AdamW, {"weight_decay": 0.1}), (Adagrad, {}), (SGD, {"momentum": 0.9})]
LOSSY = on_table(first_moment=BFloat16(), second_moment=RowWise())


def _pair(make, options, policy=EXACTLY, *, fused=True):
    """The same model under the stock optimizer and a converted one."""
    stock = Tiny()
    own = copy.deepcopy(stock)
    optimizers = [make(model.parameters(), lr=0.1, fused=fused, **options) for model in (stock, own)]
    compress(optimizers[1], own, policy)
    return [stock, own], optimizers


def _step(models, optimizers, number, factor=1.0):
    for model, optimizer in zip(models, optimizers, strict=True):
        give_gradients(model, number)
        for param in model.parameters():
            param.grad *= factor
        optimizer.step()


@pytest.mark.parametrize(("make", "options"), FUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_a_step_that_overflowed_moves_no_layer(make, options):
    models, optimizers = _pair(make, options, LOSSY)
    _step(models, optimizers, 0)
    before = snapshot(models[1], optimizers[1])
    for optimizer in optimizers:
        optimizer.found_inf = torch.tensor(1.0)
    _step(models, optimizers, 1, factor=float("inf"))  # not an error: the scaler has seen it
    assert_same(snapshot(models[1], optimizers[1]), before)
    assert torch.isinf(models[1].table.weight.grad).all()


@pytest.mark.parametrize(("make", "options"), FUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_scaled_gradients_train_as_under_torch(make, options):
    """Kept layers bit for bit, exactly stored ones up to rounding; gradients are left unscaled in both."""
    models, optimizers = _pair(make, options)
    for number, found_inf in enumerate((0.0, 1.0, 0.0)):
        for optimizer in optimizers:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(found_inf)
        _step(models, optimizers, 1 + number, factor=512)
        for stock, own in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(stock.grad, own.grad)
    assert torch.equal(models[0].kept.weight, models[1].kept.weight)
    torch.testing.assert_close(models[1].table.weight, models[0].table.weight, rtol=1e-5, atol=1e-6)
    if make is not SGD:
        for model, optimizer in zip(models, optimizers, strict=True):
            assert optimizer.state[model.table.weight]["step"] == 2


def test_a_gradient_is_not_unscaled_where_the_step_is_refused():
    (_, model), (_, optimizer) = _pair(AdamW, {})
    optimizer.grad_scale = torch.tensor(512.0)
    give_gradients(model, 0)
    optimizer.param_groups[0]["amsgrad"] = True
    before = model.table.weight.grad.clone()
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.step()
    assert torch.equal(model.table.weight.grad, before)


def test_an_optimizer_without_fused_kernels_ignores_both():
    model = Tiny()
    plain = copy.deepcopy(model)
    for one in (model, plain):
        optimizer = compress(RMSprop(one.parameters()), one, EXACTLY)
        if one is model:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(512.0)
        give_gradients(one, 0)
        optimizer.step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_step_that_is_not_fused_refuses_both_before_anything_moves():
    """As under torch."""
    (_, model), (_, optimizer) = _pair(AdamW, {}, fused=False)
    optimizer.found_inf = torch.tensor(0.0)
    give_gradients(model, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AssertionError, match="found_inf"):
        optimizer.step()
    assert_same(dict(model.state_dict()), dict(before))
    assert not optimizer.state.get(model.table.weight)
