"""A small sparse table that the policy keeps, under an optimizer of torch that takes no sparse gradients."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop, SparseAdam

import lightning_sketch
from lightning_sketch import Policy, Rule, compress
from tests.tiny import assert_same, snapshot

REFUSED = [
    (Adam, {}), (AdamW, {}), (Adam, {"foreach": True}), (AdamW, {"fused": True}), (RMSprop, {}),
    (Adagrad, {"weight_decay": 0.1}), (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
]  # fmt: skip
TAKEN = [(Adagrad, {}), (SGD, {"momentum": 0.9}), (SparseAdam, {})]


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Embedding(5, 4)
        self.large, self.small = nn.Embedding(30, 4, sparse=True), nn.Embedding(3, 4, sparse=True)


def make(cls, options, *rules):
    model = Tables()
    sparse = [{"params": model.large.parameters()}, {"params": model.small.parameters()}]
    groups = sparse if cls is SparseAdam else [{"params": model.head.parameters()}, *sparse]
    second = {} if cls is SGD else {"second_moment": "RowWise"}
    policy = Policy([*rules, Rule(role="embedding", min_rows=10, first_moment="BFloat16", **second)])
    return model, compress(cls(groups, lr=0.1, **options), model, policy)


def backward(model, *tables):
    model.zero_grad()
    sum(getattr(model, table)(torch.tensor([1, 2])).square().sum() for table in tables).backward()


@pytest.mark.parametrize(("cls", "options"), REFUSED)
def test_the_error_names_the_layer_and_what_to_do_before_anything_moves(cls, options):
    model, optimizer = make(cls, options)
    backward(model, "head", "large", "small")
    before = snapshot(model, optimizer)
    message = rf"small.weight: torch's {cls.__name__} does not support sparse gradients.*Rule\(name='small.weight', "
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(("cls", "options"), REFUSED)
def test_also_where_its_first_gradient_comes_later(cls, options):
    model, optimizer = make(cls, options)
    backward(model, "head", "large")
    optimizer.step()
    backward(model, "large", "small")
    before = model.large.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"small.weight: torch's"):
        optimizer.step()
    assert torch.equal(model.large.weight, before)


@pytest.mark.parametrize(("cls", "options"), REFUSED)
def test_the_rule_it_gives_makes_it_work(cls, options):
    model, optimizer = make(cls, options)
    backward(model, "small")
    with pytest.raises(RuntimeError) as refused:
        optimizer.step()
    rule = eval(re.search(r"Rule\(.*?\(\)\)", str(refused.value)).group(), vars(lightning_sketch))
    model, optimizer = make(cls, options, rule)
    before = model.small.weight.detach().clone()
    backward(model, "head", "large", "small")
    optimizer.step()
    assert not torch.equal(model.small.weight, before)


@pytest.mark.parametrize(("cls", "options"), TAKEN)
def test_optimizers_that_take_sparse_gradients_step_it(cls, options):
    model, optimizer = make(cls, options)
    before = model.small.weight.detach().clone()
    for _ in range(2):
        backward(model, *(["head"] if cls is not SparseAdam else []), "large", "small")
        optimizer.step()
    assert not torch.equal(model.small.weight, before)


def test_other_errors_of_torchs_step_stay():
    model, optimizer = make(Adam, {})
    backward(model, "head")
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises((RuntimeError, AssertionError), match="capturable"):
        optimizer.step()
