"""Lazy layers (pytorch's ``nn.LazyLinear``) may be kept before they have a shape, and are never compressed then."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from lightning_sketch import Policy, Rule, compress, plan, report
from tests.tiny import on_table

POLICY = on_table(first_moment="BFloat16", second_moment="RowWise")


def make():
    return nn.Sequential(nn.Embedding(30, 4), nn.LazyLinear(3), nn.LazyBatchNorm1d())


def forward(model):
    return model(torch.tensor([1, 2, 3])).square().sum()


@pytest.mark.parametrize("cls", [Adam, AdamW, RMSprop])
def test_kept_lazy_layers_train_as_without_compression(cls):
    found = []
    for compressed in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = cls(model.parameters(), lr=0.1)
        if compressed:
            compress(optimizer, model, on_table(first_moment="Keep", exp_avg="BFloat16", second_moment="RowWise"))
            report(optimizer)
        forward(model).backward()
        optimizer.step()
        found.append([p.detach() for p in model[1:].parameters()])
    for mine, stock in zip(*found, strict=True):
        assert torch.equal(mine, stock)


def test_the_plan_says_that_their_size_is_not_known():
    model = make()
    optimizer = AdamW(model.parameters())
    made = plan(model, optimizer, POLICY)
    assert [x.roles for x in made.layers] == [("embedding",)] + [("lazy",)] * 4
    assert made.bytes_before == 2 * 30 * 4 * 4
    assert "4 lazy parameters" in str(made)
    assert "not known yet" in str(made)
    compress(optimizer, model, POLICY)
    forward(model)
    assert "lazy" not in str(plan(model, optimizer, POLICY))


@pytest.mark.parametrize(
    "rule",
    [
        Rule(second_moment="BFloat16"), Rule(role="hidden", second_moment="Factored"),
        Rule(name="1.weight", first_moment="BFloat16"), Rule(module="Linear", second_moment="BFloat16"),
        Rule(role=("hidden", "embedding"), min_rows=10, second_moment="BFloat16"),
        Rule(match=lambda name, module, param: param.shape[0] >= 3, second_moment="BFloat16"),
    ],
)  # fmt: skip
def test_a_rule_that_might_compress_them_asks_for_a_forward_pass(rule):
    model = make()
    optimizer = AdamW(model.parameters())
    with pytest.raises(
        ValueError, match=r"1.weight is lazy: it has no shape yet.*rule 1.*run a forward pass of the model"
    ):
        compress(optimizer, model, Policy([rule]))
    assert type(optimizer) is AdamW
    forward(model)
    if rule.min_rows == 0 or rule.role is not None:
        compress(optimizer, model, Policy([rule]))


def test_a_predicate_that_asks_no_shape_decides():
    compress(
        AdamW((model := make()).parameters()), model, Policy([Rule(match=only_the_table, second_moment="RowWise")])
    )


def only_the_table(name, module, param):
    return name == "0.weight"


def test_rules_in_front_that_keep_them_let_them_pass():
    model = make()
    rest = Rule(second_moment="BFloat16")
    compress(AdamW(model.parameters()), model, Policy([Rule(name=("1.*", "2.*")), rest]))
    model = make()
    with pytest.raises(ValueError, match=r"1.weight is lazy.*rule 2"):  # it may become a matrix, or not
        compress(AdamW(model.parameters()), model, Policy([Rule(role="other"), rest]))


def test_a_lazy_head_is_no_softmax_layer_yet():
    model = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 4), nn.LazyLinear(30))
    policy = Policy([Rule(role="softmax", second_moment="RowWise")], role_hints="last_linear")
    with pytest.raises(ValueError, match=r"last_linear': 2.weight has no shape yet; run a forward pass"):
        compress(AdamW(model.parameters()), model, policy)
    hinted = Policy([Rule(role="softmax", second_moment="RowWise")], role_hints={"2.weight": "softmax"})
    with pytest.raises(ValueError, match=r"2.weight is lazy"):
        compress(AdamW(model.parameters()), model, hinted)


def test_a_lazy_parameter_of_another_model():
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \(shape not known yet\) is not a parameter"):
        compress(
            SGD(nn.LazyLinear(3).parameters(), lr=0.1, momentum=0.9),
            nn.Embedding(30, 4),
            on_table(first_moment="BFloat16"),
        )
