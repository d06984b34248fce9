"""Frozen parameters take no bytes in plans and budgets (DeepSpeed#2615)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Adagrad, AdamW

from lightning_sketch import BFloat16, Policy, Rule, compress, plan, report
from tests.tiny import CASES, Tiny, on_table, train

POLICY = on_table(first_moment="BFloat16", second_moment="BFloat16")


def frozen_head() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 1_000))
    return model[1].requires_grad_(False) and model


def test_a_plan_counts_what_torch_will_allocate():
    model = frozen_head()
    optimizer = AdamW(model.parameters())
    made = plan(model, optimizer, POLICY)
    assert (made.bytes_before, made.bytes_after) == (2 * 4 * 800, 2 * 2 * 800)
    model(torch.arange(3)).sum().backward()
    optimizer.step()
    assert made.bytes_before == sum(s["exp_avg"].nbytes * 2 for s in optimizer.state.values())


def test_a_frozen_table_takes_none_before_or_after():
    model = Tiny()
    model.table.weight.requires_grad_(False)
    planned = plan(model, AdamW(model.parameters()), POLICY).layers[0]
    assert planned.frozen
    assert planned.record is not None
    assert set(planned.bytes_before.values()) | set(planned.bytes_after.values()) == {0}


def test_the_printed_plan_says_frozen():
    model = frozen_head()
    model[0].requires_grad_(False)
    text = str(plan(model, AdamW(model.parameters()), POLICY))
    assert "0.weight (frozen)" in text
    assert "kept as they are (2 frozen)" in text


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_that_is_there_counts_though_its_parameter_is_frozen_since(case):
    model = Tiny()
    optimizer = case.make(model.parameters())
    before = plan(model, optimizer, on_table(first_moment="BFloat16", second_moment="BFloat16")).bytes_after
    train(model, optimizer, range(1), sparse=case.sparse)
    model.requires_grad_(False)
    assert plan(model, optimizer, on_table(first_moment="BFloat16", second_moment="BFloat16")).bytes_after == before


def test_adagrad_allocates_for_frozen_parameters_too():
    model = frozen_head()
    optimizer = Adagrad(model.parameters())
    assert plan(model, optimizer, POLICY).bytes_before == sum(s["sum"].nbytes for s in optimizer.state.values())
    made = plan(model, compress(optimizer, model, POLICY), POLICY)
    assert made.bytes_after == report(optimizer).state - 3 * 4  # its steps


def test_a_budget_drops_no_moment_for_a_frozen_layer():
    model = frozen_head()
    policy = Policy.for_budget(model, AdamW(model.parameters()), 2 * 2 * 800)
    assert [rule.first_moment for rule in policy.rules] == [BFloat16()]
    assert policy.rules[0].second_moment == BFloat16()


def test_a_budget_s_policy_is_for_layers_that_are_trained():
    model = frozen_head()
    model[0].requires_grad_(False)
    head = nn.Linear(1_000, 2)
    whole = nn.Sequential(model, head)
    optimizer = AdamW(head.parameters())
    policy = Policy.for_budget(whole, optimizer, "10KB")
    assert [rule.role for rule in policy.rules] == ["hidden"]
    compress(optimizer, whole, policy)
    with pytest.raises(ValueError, match="the optimizer trains no embedding, softmax or hidden layer"):
        Policy.for_budget(whole, AdamW([head.bias]), "10KB")


def test_an_unfrozen_layer_is_planned_and_compressed_as_ever():
    model = frozen_head()
    policy = Policy([*POLICY.rules, Rule(role="hidden", first_moment="BFloat16", second_moment="Factored")])
    optimizer = compress(AdamW(model.parameters()), model, policy)
    assert plan(model, optimizer, policy).bytes_after == 2 * 2 * 800
    model[1].requires_grad_(True)
    planned = plan(model, optimizer, policy).bytes_after
    model(torch.arange(3)).sum().backward()
    optimizer.step()
    assert planned == report(optimizer).state - 3 * 4
    assert "exp_avg_sq_col" in optimizer.state[model[1].weight]
