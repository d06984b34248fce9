"""Copies of a model and its converted optimizer, in any order and inside other objects (skorch#317)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from lightning_sketch import compress, decompress
from lightning_sketch.layers.record import LayerRecord
from tests.tiny import ADAMW, CASES, LOSSY, Tiny, assert_same, snapshot, train

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Growing(Tiny):
    """Whose table is trained from the beginning, and whose second one later."""

    def __init__(self):
        super().__init__()
        self.late = nn.Embedding(20, 3)


class Holder(nn.Module):
    """Holds both, as trainers do."""

    def __init__(self, model, optimizer):
        super().__init__()
        self.optimizer = optimizer  # a plain attribute; modules are copied before those
        self.model = model


class Net:
    """skorch's order."""

    def __init__(self, model, optimizer):
        self.optimizer_, self.module_ = optimizer, model


def deep(x):
    return copy.deepcopy(x)


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def model_first(way, model, optimizer):
    return way((model, optimizer))


def optimizer_first(way, model, optimizer):
    return way((optimizer, model))[::-1]


def in_a_module(way, model, optimizer):
    holder = way(Holder(model, optimizer))
    return holder.model, holder.optimizer


def in_an_object(way, model, optimizer):
    net = way(Net(model, optimizer))
    return net.module_, net.optimizer_


def make(case=ADAMW):
    model = Growing()
    params = [*model.table.parameters(), *model.kept.parameters()]
    return model, compress(case.make(params), model, LOSSY)


@pytest.mark.parametrize("way", [deep, pickled])
@pytest.mark.parametrize("where", [model_first, optimizer_first, in_a_module, in_an_object])
@every_case
def test_a_copy_knows_the_copied_model(case, where, way):
    model, optimizer = make(case)
    if not case.sparse:
        train(model, optimizer, [0])
    before = snapshot(model, optimizer)
    twin, its = where(way, model, optimizer)
    for param in twin.parameters():
        param.grad = None
    weights = copy.deepcopy(twin.state_dict())
    its.step()  # without gradients
    assert_same(twin.state_dict(), weights)
    its.add_param_group({"params": twin.late.parameters()})
    assert LayerRecord.from_record(its.param_groups[1]["compression"][0]).fqn == "late.weight"
    train(twin, its, [1, 2], sparse=case.sparse)
    assert any(key.endswith("_table") for key in its.state[twin.late.weight])
    assert_same(snapshot(model, optimizer), before)
    assert type(decompress(its)) is case.cls


@pytest.mark.parametrize("way", [deep, pickled])
def test_a_copied_optimizer_alone_steps_and_cannot_grow(way):
    model, optimizer = make()
    train(model, optimizer, [0])
    its = way(optimizer)
    params = [param for group in its.param_groups for param in group["params"]]
    for param in params:
        param.grad = None
    its.step()
    for param in params:
        param.grad = torch.ones_like(param)
    its.step()
    with pytest.raises(RuntimeError, match="no longer knows its model"):
        its.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))]})
    assert not torch.equal(params[0], model.table.weight)


def test_the_original_keeps_its_own_model():
    model, optimizer = make()
    twins = [copy.deepcopy(x) for x in ((model, optimizer), (optimizer, model), optimizer)]
    optimizer.add_param_group({"params": model.late.parameters()})
    train(model, optimizer, [0])
    assert [len(x.param_groups) for x in (twins[0][1], twins[1][0], twins[2])] == [1, 1, 1]


@pytest.mark.parametrize("order", [model_first, optimizer_first])
def test_a_copy_keeps_neither_model_alive(order):
    model, optimizer = make()
    twin, its = order(deep, model, optimizer)
    its.step()
    references = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(twin)]
    del model, optimizer, twin
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    with pytest.raises(RuntimeError, match="no longer knows its model"):
        its.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))]})


def test_a_copy_is_not_given_a_model_of_the_same_class():
    model, optimizer = make()
    other = copy.deepcopy(model)
    its = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="no longer knows its model"):
        its.add_param_group({"params": other.late.parameters()})
