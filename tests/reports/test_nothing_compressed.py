"""A policy that compresses nothing of what is trained says so (peft#3499, peft#2376)."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW

from lightning_sketch import Factored, Policy, Rule, compress, decompress, decompress_state_dict, plan, report
from lightning_sketch.integrations.transformers import CompressedOptimizerFactory, compressed_optimizer
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.convert import compress_all
from tests.tiny import CASES, Tiny, assert_same, on_table, snapshot, train

POLICY = on_table(first_moment="BFloat16", second_moment="RowWise")


def lora() -> Tiny:
    """A frozen table beside trained layers, as adapters leave it."""
    model = Tiny()
    model.table.weight.requires_grad_(False)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="lightning_sketch.optimizer.coverage")
    return lambda: [
        record.getMessage() for record in caplog.records if record.name == "lightning_sketch.optimizer.coverage"
    ]


def test_a_policy_for_a_table_that_the_optimizer_does_not_hold_is_an_error():
    model = lora()
    optimizer = AdamW(trained(model))
    reason = r"rule 1 \(role='embedding'\) compresses nothing: table.weight: not in the optimizer, frozen \(requires_gr"
    with pytest.raises(ValueError, match=rf"compresses nothing of what is trained:\n.*{reason}(?s:.*)allow_empty=True"):
        compress(optimizer, model, POLICY)
    assert type(optimizer) is AdamW
    assert "compression" not in optimizer.param_groups[0]


def test_a_policy_for_a_frozen_table_in_the_optimizer_is_an_error():
    model = lora()
    with pytest.raises(ValueError, match=r"table.weight: frozen \(requires_grad=False\)\nFrozen layers .* unfrozen"):
        compress(AdamW(model.parameters()), model, POLICY)


def test_a_table_that_is_trained_by_another_optimizer_is_named():
    model = Tiny()
    with pytest.raises(ValueError, match=r"table\.weight: not in the optimizer\n"):
        compress(AdamW(model.kept.parameters()), model, POLICY)


def test_allow_empty_makes_it_a_warning(warnings):
    model = lora()
    optimizer = compress(AdamW(trained(model)), model, POLICY, allow_empty=True)
    assert isinstance(optimizer, CompressedOptimizer)
    (message,) = warnings()
    assert "table.weight: not in the optimizer, frozen" in message


def test_a_rule_that_compresses_nothing_beside_one_that_does_is_a_warning(warnings):
    model = nn.ModuleList([nn.Embedding(9, 2) for _ in range(5)] + [nn.Linear(2, 2)])
    for table in model[:5]:
        table.weight.requires_grad_(False)
    hidden = Rule(role="hidden", first_moment="BFloat16", second_moment="Factored")
    compress(AdamW(trained(model)), model, Policy([*POLICY.rules, hidden]))
    assert warnings() == [
        "policy rule 1 (role='embedding') compresses nothing: 0.weight, 1.weight, 2.weight and 2 more: not in the "
        "optimizer, frozen (requires_grad=False)"
    ]


def test_reasons_are_told_apart(warnings):
    model = nn.ModuleList([nn.Embedding(9, 2), nn.Embedding(9, 2), nn.Linear(2, 2)])
    model[0].weight.requires_grad_(False)
    params = [model[0].weight, *model[2].parameters()]
    compress(AdamW(params), model, POLICY, allow_empty=True)
    assert "0.weight: frozen (requires_grad=False); 1.weight: not in the optimizer\n" in warnings()[0]


def test_optional_rules_that_match_nothing_are_named_with_what_came_nearest():
    model = Tiny()
    policy = Policy([Rule(role="embedding", min_rows=31, second_moment="RowWise", optional=True)])
    with pytest.raises(ValueError, match=r"rule 1 .* matched no parameter; nearest is 'table.weight' with 30 rows"):
        compress(AdamW(model.parameters()), model, policy)


def test_a_policy_that_asks_for_nothing_is_left_in_peace(warnings):
    model = Tiny()
    compress(AdamW(model.parameters()), model, Policy([Rule(role="embedding"), Rule(second_moment="Keep")]))
    assert warnings() == []


def test_several_optimizers_are_judged_together(warnings):
    model = Tiny()
    optimizers = [AdamW(model.kept.parameters()), AdamW(model.table.parameters())]
    compress_all(optimizers, model, POLICY, explicit=True, nonfinite="raise", allow_empty=False)
    assert warnings() == []
    assert all(isinstance(o, CompressedOptimizer) for o in optimizers)

    model = lora()
    optimizers = [AdamW([p]) for p in trained(model)]
    with pytest.raises(ValueError, match="compresses nothing"):
        compress_all(optimizers, model, POLICY, explicit=True, nonfinite="raise", allow_empty=False)
    assert [type(optimizer) for optimizer in optimizers] == [AdamW, AdamW]


def test_what_is_converted_already_counts(warnings):
    model = Tiny()
    optimizers = [compress(AdamW(model.table.parameters()), model, POLICY), AdamW(model.kept.parameters())]
    compress_all(optimizers, model, POLICY, explicit=True, nonfinite="raise", allow_empty=False)
    assert warnings() == []


def test_a_frozen_layer_is_compressed_once_it_is_unfrozen():
    model = lora()
    optimizer = compress(AdamW(model.parameters()), model, POLICY, allow_empty=True)
    for thawed in (False, True):
        model.table.weight.requires_grad_(thawed)
        before = model.table.weight.detach().clone()
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
        assert torch.equal(model.table.weight, before) != thawed
        assert ("exp_avg_sq_row" in optimizer.state.get(model.table.weight, {})) == thawed


def test_a_frozen_layer_that_will_lose_a_state_is_called_frozen(caplog):
    compress(AdamW((model := lora()).parameters()), model, on_table(exp_avg="Drop"), allow_empty=True)
    assert "exp_avg of table.weight (frozen now) is dropped: these layers train without it" in caplog.messages


def test_a_frozen_layer_that_has_a_state_is_compressed(warnings):
    model = lora()
    optimizer = compress(Adagrad(model.parameters()), model, POLICY)  # which allocates in its constructor
    assert warnings() == []
    assert "sum_row" in optimizer.state[model.table.weight]


# Without a policy


def test_without_a_policy_a_model_without_tables_is_converted_and_told_of_a_preset(warnings):
    model = nn.Linear(3, 4)
    optimizer = compress(AdamW(model.parameters()), model)
    assert isinstance(optimizer, CompressedOptimizer)
    (message,) = warnings()
    assert message.startswith("nothing is compressed. The default policy is for embedding and softmax tables, and the ")
    preset = eval(re.search(r"Policy\(.*\)", message)[0])
    assert plan(model, optimizer, preset).layers[0].layer.codecs["exp_avg_sq"] == Factored()


def test_without_a_policy_small_tables_are_named_with_their_rows(warnings):
    model = nn.ModuleList([nn.Embedding(20, 2), nn.Embedding(9_999, 2)])
    compress(AdamW(model.parameters()), model)
    (message,) = warnings()
    assert 'and the largest, 1.weight, has 9,999. To compress the tables, pass Policy([Rule(role="embedding"' in message


def test_without_a_policy_a_large_frozen_table_is_named(warnings):
    model = nn.ModuleList([nn.Embedding(10_000, 2), nn.Linear(2, 2)])
    model[0].weight.requires_grad_(False)
    compress(AdamW(model.parameters()), model)
    (message,) = warnings()
    assert "0.weight: frozen (requires_grad=False). To compress the hidden layers, pass Policy(" in message


def test_an_optimizer_without_states_gets_no_preset_that_would_fail(warnings):
    model = nn.Linear(3, 4)
    compress(SGD(model.parameters(), lr=0.1), model)
    assert warnings()[0].endswith("The optimizer keeps no states (is momentum 0?)")
    large = nn.Embedding(10_000, 2)
    compress(SGD(large.parameters(), lr=0.1), large)
    assert warnings()[1].endswith("The optimizer keeps no states (is momentum 0?)")
    model = nn.ParameterList([nn.Parameter(torch.ones(3))])
    compress(Adagrad(model.parameters(), lr=0.1), model)
    assert warnings()[2].endswith("The optimizer trains no matrix that a policy could compress")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_converted_optimizer_with_nothing_compressed_is_torch_s(case, warnings):
    plain_model, model = Tiny(), Tiny()
    model.load_state_dict(plain_model.state_dict())
    plain, optimizer = case.make(plain_model.parameters()), compress(case.make(model.parameters()), model)
    assert len(warnings()) == 1
    for each, its in ((plain_model, plain), (model, optimizer)):
        train(each, its, range(3), sparse=case.sparse)
    assert_same(snapshot(model, optimizer), snapshot(plain_model, plain))
    assert report(optimizer).state == report(plain).state

    # Its checkpoints are the plain optimizer's, there and back, and the guard lets the plain one step with them.
    saved = optimizer.state_dict()
    assert_same(saved["state"], plain.state_dict()["state"])
    plain.load_state_dict(copy.deepcopy(saved))
    optimizer.load_state_dict(decompress_state_dict(saved))
    for each, its in ((plain_model, plain), (model, optimizer)):
        train(each, its, range(3, 5), sparse=case.sparse)
    assert_same(snapshot(model, optimizer), snapshot(plain_model, plain))
    assert type(decompress(optimizer)) is case.cls


def test_a_group_that_is_added_later_is_decided_by_the_default_policy(caplog):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Embedding(10_000, 2)])
    optimizer = compress(AdamW(model[0].parameters()), model)
    caplog.clear()
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert caplog.messages == ["exp_avg of 1.weight is dropped: these layers train without it"]
    train(model, optimizer, range(1))
    assert "exp_avg_sq_row" in optimizer.state[model[1].weight]
    assert "exp_avg" not in optimizer.state[model[1].weight]


# Trainers


def test_the_factory_of_hugging_face_passes_allow_empty():
    model, args = lora(), {"policy": POLICY, "lr": 0.1}
    with pytest.raises(ValueError, match="compresses nothing"):
        CompressedOptimizerFactory()(model, **args)
    assert isinstance(CompressedOptimizerFactory()(model, **args, allow_empty=True), CompressedOptimizer)
    from transformers import TrainingArguments

    factory, kwargs = compressed_optimizer(TrainingArguments("out", use_cpu=True), POLICY, allow_empty=True)
    assert isinstance(factory()(model, **kwargs), CompressedOptimizer)
