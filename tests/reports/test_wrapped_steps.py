"""A step that was wrapped, compiled or mocked before `compress` is so around the converted one (torchtune#2681)."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any
from unittest.mock import DEFAULT, MagicMock, patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_sketch import compress, decompress
from tests.tiny import ADAMW, CASES, EXACTLY, LOSSY, Tiny, assert_same, give_gradients, snapshot, train

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def by_closure(optimizer: Any, calls: list[Any]) -> Any:
    bound = optimizer.step

    @functools.wraps(bound)
    def wrapped(*args, **kwargs):
        calls.append(1)
        return bound(*args, **kwargs)

    return wrapped


def by_mock(optimizer: Any, calls: list[Any]) -> Any:
    return MagicMock(wraps=optimizer.step, side_effect=lambda *_: calls.append(1) or DEFAULT)


def by_method(optimizer: Any, calls: list[Any]) -> Any:
    stock = type(optimizer).step

    def step(self, closure=None):
        calls.append(1)
        return stock(self, closure)

    return types.MethodType(step, optimizer)


def by_method_of_the_class_it_then_has(optimizer: Any, calls: list[Any]) -> Any:
    def step(self, closure=None):
        calls.append(1)
        return type(self).step(self, closure)

    return types.MethodType(step, optimizer)


def by_partial(optimizer: Any, calls: list[Any]) -> Any:
    def call(step, *args):
        calls.append(1)
        return step(*args)

    return functools.partial(call, optimizer.step)


def by_compiler(optimizer: Any, calls: list[Any]) -> Any:
    return by_partial(types.SimpleNamespace(step=torch.compile(optimizer.step, backend="eager")), calls)


WRAPS = [by_closure, by_mock, by_method, by_method_of_the_class_it_then_has, by_partial, by_compiler]


def assert_equal_weights(model: nn.Module, plain: nn.Module) -> None:
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-4, atol=1e-5)


def test_every_wrapper_of_every_optimizer_is_called_around_the_converted_step():
    for wrap in WRAPS:
        for case in CASES if wrap is not by_compiler else (ADAMW,):  # which takes seconds
            model, calls = Tiny(), []
            plain = copy.deepcopy(model)
            optimizer, stock = case.make(model.parameters()), case.make(plain.parameters())
            optimizer.step = wrapped = wrap(optimizer, calls)
            compress(optimizer, model, EXACTLY)
            assert optimizer.step is wrapped
            train(model, optimizer, range(3), sparse=case.sparse)
            train(plain, stock, range(3), sparse=case.sparse)
            assert len(calls) == 3
            assert_equal_weights(model, plain)
            assert any(key.endswith("_table") for key in optimizer.state[model.table.weight])


@every_case
def test_a_step_of_the_stock_class_is_the_converted_step_once(case):
    """Of a closure, too, and of hooks: the same as by ``optimizer.step()``."""
    model, other = Tiny(), Tiny()
    other.load_state_dict(model.state_dict())
    pair = [(m, compress(case.make(m.parameters()), m, LOSSY)) for m in (model, other)]
    found = []
    for (net, optimizer), step in zip(
        pair, (lambda o, c: case.cls.step(o, c), lambda o, c: o.step(closure=c)), strict=True
    ):
        calls: list[Any] = []
        handles = [
            optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre")),
            optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post")),
            register_optimizer_step_pre_hook(lambda *_, calls=calls: calls.append("global pre")),
            register_optimizer_step_post_hook(lambda *_, calls=calls: calls.append("global post")),
        ]

        def closure(net=net, calls=calls):
            calls.append(torch.is_grad_enabled())
            give_gradients(net, 0, sparse=case.sparse)
            return torch.tensor(3.5)

        assert step(optimizer, closure) == 3.5
        for handle in handles:
            handle.remove()
        found.append((calls, snapshot(net, optimizer)))
    assert found[0][0] == ["global pre", "pre", True, "post", "global post"]
    assert_same(found[0], found[1])


def test_an_error_in_a_redirected_step_leaves_everything_as_it_was():
    model = Tiny()
    optimizer = ADAMW.make(model.parameters())
    optimizer.step = by_closure(optimizer, [])
    compress(optimizer, model, LOSSY)
    give_gradients(model, 0)
    model.table.weight.grad = model.table.weight.grad.to_sparse()
    before = snapshot(model, optimizer)
    with pytest.raises(TypeError, match=r"table.weight is sparse in 2 dimensions"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("wrap", [w for w in WRAPS if w is not by_compiler], ids=lambda f: f.__name__)
def test_a_wrapper_from_before_decompress_is_around_the_stock_step_then(wrap):
    model, calls = Tiny(), []
    plain = copy.deepcopy(model)
    optimizer, stock = ADAMW.make(model.parameters()), ADAMW.make(plain.parameters())
    compress(optimizer, model, EXACTLY)
    optimizer.step = wrap(optimizer, calls)
    train(model, optimizer, range(2))
    decompress(optimizer)
    train(model, optimizer, range(2, 4))
    train(plain, stock, range(4))
    assert len(calls) == 4
    assert_equal_weights(model, plain)
    assert "exp_avg" in optimizer.state[model.table.weight]


@pytest.mark.parametrize("first", ["scheduler", "wrapper"])
@pytest.mark.parametrize("when", [0, 2])
def test_with_a_scheduler_both_wrappers_stay(first, when):
    model, calls = Tiny(), []
    plain = copy.deepcopy(model)
    optimizer, stock = SGD(model.parameters(), lr=0.1, momentum=0.9), SGD(plain.parameters(), lr=0.1, momentum=0.9)
    if first == "scheduler":
        scheduler = StepLR(optimizer, 1, gamma=0.5)
        optimizer.step = by_closure(optimizer, calls)
    else:  # torch's scheduler takes bound methods only
        optimizer.step = by_method(optimizer, calls)
        scheduler = StepLR(optimizer, 1, gamma=0.5)
    reference = StepLR(stock, 1, gamma=0.5)
    for step in range(4):
        if step == when:
            compress(optimizer, model, EXACTLY)
        train(model, optimizer, [step])
        train(plain, stock, [step])
        scheduler.step()
        reference.step()
    assert len(calls) == 4
    assert optimizer._opt_called
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")
    assert_equal_weights(model, plain)


@pytest.mark.parametrize("when", [0, 2])
def test_steps_that_accelerate_bound_beside_a_grad_scaler_are_the_converted_step(when):
    """Where the optimizer inside the wrapper is converted, and not the wrapper."""
    model = Tiny()
    plain = copy.deepcopy(model)
    Accelerator(cpu=True)
    pair = [(m, ADAMW.make(m.parameters())) for m in (model, plain)]
    wrappers = [AcceleratedOptimizer(o, scaler=torch.amp.GradScaler("cpu", init_scale=1.0)) for _, o in pair]
    for step in range(4):
        if step == when:
            compress(pair[0][1], model, EXACTLY)
        for (net, _), wrapper in zip(pair, wrappers, strict=True):
            wrapper.scaler.scale(torch.ones(()))  # creates the scale
            train(net, wrapper, [step])
            assert not wrapper.step_was_skipped
    assert_equal_weights(model, plain)
    assert "exp_avg_table" in pair[0][1].state[model.table.weight]


def test_what_only_binds_the_class_s_step_is_bound_anew():
    model = Tiny()
    optimizer = ADAMW.make(model.parameters())
    optimizer.step = optimizer.step  # as Accelerate does beside a GradScaler
    compress(optimizer, model, LOSSY)
    assert "step" not in vars(optimizer)


def test_other_methods_that_were_wrapped_work_on():
    model, calls = Tiny(), []
    optimizer = AdamW(model.kept.parameters())
    for name in ("zero_grad", "state_dict", "add_param_group"):
        bound = getattr(optimizer, name)
        setattr(optimizer, name, lambda *args, bound=bound, name=name: (calls.append(name), bound(*args))[1])
    compress(optimizer, model, LOSSY, allow_empty=True)
    optimizer.add_param_group({"params": list(model.table.parameters())})
    train(model, optimizer, [0])
    assert "exp_avg_table" in optimizer.state[model.table.weight]
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][1]["compression"][0] is not None
    optimizer.zero_grad()
    assert model.table.weight.grad is None
    assert calls == ["add_param_group", "state_dict", "zero_grad"]


def test_a_wrapped_load_state_dict_is_refused_when_it_loads_and_nothing_is_changed():
    model = Tiny()
    optimizer = ADAMW.make(model.parameters())
    bound = optimizer.load_state_dict
    optimizer.load_state_dict = lambda state_dict: bound(state_dict)
    compress(optimizer, model, LOSSY)
    train(model, optimizer, [0])
    before, saved = snapshot(model, optimizer), optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"call compress\(\) before optimizer.load_state_dict is wrapped"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(model, optimizer), before)
    del optimizer.load_state_dict
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("autospec", [False, True])
@every_case
def test_a_mocked_stock_step_is_called_for_kept_layers(case, autospec):
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, LOSSY)
    before = snapshot(model, optimizer)
    with patch.object(case.cls, "step", autospec=autospec) as step:
        train(model, optimizer, range(2), sparse=case.sparse)
    assert step.call_args_list == [((optimizer,) if autospec else (),)] * 2
    assert torch.equal(model.kept.weight, before["kept.weight"])
    assert not torch.equal(model.table.weight, before["table.weight"])
    train(model, optimizer, [2], sparse=case.sparse)
    assert not torch.equal(model.kept.weight, before["kept.weight"])


@every_case
def test_a_wrapped_stock_step_is_called_for_kept_layers_and_hooks_fire_once(case, monkeypatch):
    model, calls = Tiny(), []
    plain = copy.deepcopy(model)
    optimizer, stock = case.make(model.parameters()), case.make(plain.parameters())
    compress(optimizer, model, EXACTLY)
    original = case.cls.step

    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        calls.append("kept")
        return original(self, *args, **kwargs)

    train(plain, stock, range(3), sparse=case.sparse)
    monkeypatch.setattr(case.cls, "step", wrapped)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global post"))
    train(model, optimizer, range(3), sparse=case.sparse)
    handle.remove()
    assert calls == ["pre", "kept", "global post"] * 3
    assert_equal_weights(model, plain)


def test_a_stock_step_that_fails_leaves_hooks_and_gradients_in_place():
    model = Tiny()
    optimizer = compress(ADAMW.make(model.parameters()), model, LOSSY)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    give_gradients(model, 0)
    grad = model.table.weight.grad
    with patch.object(AdamW, "step", side_effect=ValueError("mocked")), pytest.raises(ValueError, match="mocked"):
        optimizer.step()
    assert model.table.weight.grad is grad
    optimizer.step()
    assert calls == ["pre", "pre"]
