"""compress and decompress: the same object, kept layers untouched, states carried over."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Adagrad, Adam, AdamW

from lightning_sketch import BFloat16, Drop, Keep, Policy, Rule, compress, decompress, default_policy, report
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.classes import COMPRESSED
from tests.tiny import ADAM, ADAMW, CASES, EXACTLY, LOSSY, Tiny, assert_same, on_table, snapshot, train

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def kept_of(model, optimizer):
    return {k: v for k, v in snapshot(model, optimizer).items() if k.startswith("kept")}


@every_case
def test_the_same_object_comes_back_in_both_directions(case):
    model = Tiny()
    optimizer = case.make(model.parameters())
    groups = optimizer.param_groups
    assert compress(optimizer, model, LOSSY) is optimizer
    assert type(optimizer) is COMPRESSED[case.cls]
    assert isinstance(optimizer, case.cls) or case.cls is Adagrad  # which DeepSpeed would replace
    assert decompress(optimizer) is optimizer
    assert type(optimizer) is case.cls
    assert optimizer.param_groups is groups


MODES = ({"foreach": True}, {"foreach": False}, {"fused": True})
IMPLEMENTATIONS = [(case, {}) for case in CASES] + [
    (case, mode)
    for case in CASES
    for mode in MODES
    if mode.keys() <= case.make([nn.Parameter(torch.ones(1))]).defaults.keys()  # RMSprop has no fused one
]


@pytest.mark.parametrize("converted_at", [0, 2])
@pytest.mark.parametrize(("case", "mode"), IMPLEMENTATIONS, ids=str)
def test_kept_layers_train_bit_for_bit_as_before(case, mode, converted_at):
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, stock = case.make(model.parameters(), **mode), case.make(plain.parameters(), **mode)
    train(model, optimizer, range(converted_at), sparse=case.sparse)
    compress(optimizer, model, LOSSY)
    train(model, optimizer, range(converted_at, 5), sparse=case.sparse)
    train(plain, stock, range(5), sparse=case.sparse)
    assert_same(kept_of(model, optimizer), kept_of(plain, stock))
    assert not torch.equal(model.table.weight, plain.table.weight)  # so the other layer was compressed
    decompress(optimizer)
    train(model, optimizer, range(5, 7), sparse=case.sparse)
    train(plain, stock, range(5, 7), sparse=case.sparse)
    assert_same(kept_of(model, optimizer), kept_of(plain, stock))


@every_case
def test_a_policy_that_keeps_everything_changes_nothing(case):
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer = compress(case.make(model.parameters()), model, Policy([Rule()]))
    stock = case.make(plain.parameters())
    train(model, optimizer, range(4), sparse=case.sparse)
    train(plain, stock, range(4), sparse=case.sparse)
    assert_same(snapshot(model, optimizer), snapshot(plain, stock))


@every_case
def test_to_and_fro_in_mid_training_with_exact_codecs_equals_never_having_converted(case):
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, stock = case.make(model.parameters()), case.make(plain.parameters())
    train(plain, stock, range(9), sparse=case.sparse)
    train(model, optimizer, range(3), sparse=case.sparse)
    compress(optimizer, model, EXACTLY)
    train(model, optimizer, range(3, 6), sparse=case.sparse)
    decompress(optimizer)
    train(model, optimizer, range(6, 9), sparse=case.sparse)
    found, expected = snapshot(model, optimizer), snapshot(plain, stock)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_to_and_fro_at_once_is_bit_exact_with_exact_codecs(case):
    model = Tiny()
    optimizer = case.make(model.parameters())
    train(model, optimizer, range(3), sparse=case.sparse)
    before = snapshot(model, optimizer)
    compress(optimizer, model, EXACTLY)
    assert snapshot(model, optimizer).keys() != before.keys()
    decompress(optimizer)
    assert_same(snapshot(model, optimizer), before)


@every_case
def test_to_and_fro_before_the_first_step_leaves_a_fresh_optimizer(case):
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, stock = case.make(model.parameters()), case.make(plain.parameters())
    decompress(compress(optimizer, model, LOSSY))
    train(model, optimizer, range(3), sparse=case.sparse)
    train(plain, stock, range(3), sparse=case.sparse)
    assert_same(snapshot(model, optimizer), snapshot(plain, stock))
    assert optimizer.state_dict()["param_groups"] == stock.state_dict()["param_groups"]


def test_a_dropped_moment_has_error_one_and_comes_back_as_zeros():
    model = Tiny()
    optimizer = ADAM.make(model.parameters())
    train(model, optimizer, range(2))
    compress(optimizer, model, on_table(exp_avg=Drop(), exp_avg_sq=BFloat16()))
    assert report(optimizer).conversion_errors.keys() == {"table.weight"}  # uncompressed layers have none
    assert report(optimizer).conversion_errors["table.weight"]["exp_avg"] == 1.0
    state = decompress(optimizer).state[model.table.weight]
    assert not state["exp_avg"].any()
    assert state["exp_avg_sq"].any()


def test_dropping_a_state_is_announced(caplog):
    model = Tiny()
    with caplog.at_level(logging.WARNING, "lightning_sketch"):
        compress(ADAM.make(model.parameters()), model, on_table(exp_avg=Drop()))
    assert caplog.messages == ["exp_avg of table.weight is dropped: these layers train without it"]


def test_repeated_blocks_are_announced_together(caplog):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)), nn.Embedding(3, 2))
    with caplog.at_level(logging.WARNING, "lightning_sketch"):
        compress(AdamW(model.parameters()), model, Policy([Rule(name="*.weight", exp_avg=Drop())]))
    assert caplog.messages == ["exp_avg of *.weight (101 layers) is dropped: these layers train without it"]


@every_case
def test_a_conversion_before_the_first_step_has_no_errors(case):
    model = Tiny()
    optimizer = case.make(model.parameters())
    eager = bool(optimizer.state)
    compress(optimizer, model, LOSSY)
    assert not report(optimizer).conversion_errors
    # DCP takes it that either all layers have state or none.
    assert [param in optimizer.state for param in model.parameters()] == [eager] * 3
    assert eager == (case.cls is Adagrad)


def test_converting_again_with_the_same_policy_does_nothing():
    model = Tiny()
    optimizer = compress(ADAMW.make(model.parameters()), model, LOSSY)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    assert compress(optimizer, model, copy.deepcopy(LOSSY)) is optimizer
    assert compress(optimizer, model) is optimizer  # no policy asks for nothing new
    assert type(optimizer) is COMPRESSED[AdamW]
    assert_same(snapshot(model, optimizer), before)


def test_converting_again_with_another_policy_is_an_error_until_decompressed():
    model = Tiny()
    optimizer = compress(ADAMW.make(model.parameters()), model, LOSSY)
    other = on_table(second_moment="SM3")
    with pytest.raises(ValueError, match="already compressed under another policy; call decompress"):
        compress(optimizer, model, other)
    compress(decompress(optimizer), model, other)
    train(model, optimizer, [0])
    assert "exp_avg_sq_dim0" in optimizer.state[model.table.weight]


def test_a_policy_may_be_a_dictionary():
    model = Tiny()
    optimizer = compress(ADAM.make(model.parameters()), model, {"rules": [{"role": "embedding", "exp_avg_sq": "SM3"}]})
    train(model, optimizer, [0])
    assert report(optimizer).state_by_codec["SM3"] == 4 * (30 + 4) + 8  # rows, columns, scale


def test_without_a_policy_the_default_one_is_used():
    model = nn.Embedding(10_000, 2)
    optimizer = compress(Adam(model.parameters()), model)
    assert optimizer.compression.policy == default_policy()


def test_decompress_returns_a_plain_optimizer_as_it_is():
    optimizer = ADAM.make(Tiny().parameters())
    assert decompress(optimizer) is optimizer
    assert type(optimizer) is Adam


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, LightningOptimizer], ids=["itself", "its wrapper"])
def test_an_optimizer_that_is_given_twice_is_refused_and_not_changed(wrap):
    model = Tiny()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="the same optimizer twice, or an optimizer and its wrapper"):
        compress([optimizer, wrap(optimizer)], model, LOSSY)
    assert type(optimizer) is AdamW
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("wrong", [None, [1], "model"], ids=str)
def test_what_is_no_module_is_refused(wrong):
    optimizer = AdamW(Tiny().parameters())
    with pytest.raises(TypeError, match=rf"must be the torch\.nn\.Module .* got {type(wrong).__name__}"):
        compress(optimizer, wrong)
    assert type(optimizer) is AdamW


def test_a_rejected_conversion_changes_nothing():
    model = Tiny()
    optimizer = ADAM.make(model.parameters())
    train(model, optimizer, range(2))
    optimizer.state[model.table.weight]["exp_avg_sq"] = torch.zeros(3)  # not torch's
    before, groups = snapshot(model, optimizer), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"table.weight: its exp_avg_sq should be a tensor of shape \[30, 4\]"):
        compress(optimizer, model, LOSSY)
    assert type(optimizer) is Adam
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.param_groups[0].keys() == groups[0].keys()


@pytest.mark.parametrize("converted_at", [0, 2])
def test_a_lightning_optimizer_is_converted_inside(converted_at):
    model = Tiny()
    inner = ADAMW.make(model.parameters())
    wrapper = LightningOptimizer(inner)
    train(model, inner, range(converted_at))
    assert compress(wrapper, model, LOSSY) is wrapper
    assert type(inner) is COMPRESSED[AdamW]
    assert isinstance(wrapper, CompressedOptimizer)
    assert isinstance(wrapper, LightningOptimizer)
    assert wrapper.optimizer is inner
    assert decompress(wrapper) is wrapper
    assert type(inner) is AdamW
    assert not isinstance(wrapper, CompressedOptimizer)


def test_an_accelerated_optimizer_is_converted_inside():
    model = Tiny()
    inner = ADAMW.make(model.parameters())
    wrapper = Accelerator(cpu=True).prepare(inner)
    assert isinstance(wrapper, AcceleratedOptimizer)
    assert compress(wrapper, model, LOSSY) is wrapper
    assert type(wrapper) is AcceleratedOptimizer
    assert type(inner) is COMPRESSED[AdamW]
    train(model, wrapper, range(2))
    assert "exp_avg_table" in inner.state[model.table.weight]
    assert decompress(wrapper) is wrapper
    assert type(inner) is AdamW


def test_a_fused_optimizer_gets_its_grad_scaler_flag_back():
    model = Tiny()
    optimizer = Adam(model.parameters(), fused=True)
    assert not hasattr(compress(optimizer, model, LOSSY), "_step_supports_amp_scaling")
    assert decompress(optimizer)._step_supports_amp_scaling


def test_a_kept_state_beside_a_compressed_one_is_torch_s():
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer = compress(ADAMW.make(model.parameters()), model, on_table(exp_avg=Keep(), exp_avg_sq="RowWise"))
    stock = ADAMW.make(plain.parameters())
    train(model, optimizer, range(4))
    train(plain, stock, range(4))
    torch.testing.assert_close(
        optimizer.state[model.table.weight]["exp_avg"], stock.state[plain.table.weight]["exp_avg"], rtol=1e-5, atol=1e-7
    )
