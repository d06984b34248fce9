"""Policy.for_budget: the mildest policy that fits a number of bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sketch import BFloat16, Factored, Keep, Policy, Quantized, RowWise, compress, plan, report


def _model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5_000, 16), nn.Linear(16, 64), nn.Linear(64, 64))


@pytest.mark.parametrize("fraction", [1.0, 0.6, 0.3, 0.1, 0.05, 0.01])
def test_the_plan_and_the_live_states_fit_the_budget(fraction):
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    dense = 8 * sum(p.numel() for p in model.parameters())
    policy = Policy.for_budget(model, optimizer, int(dense * fraction))
    compress(optimizer, model, policy)
    model(torch.randint(0, 5_000, (4, 3))).square().sum().backward()
    optimizer.step()
    steps = 4 * len(list(model.parameters()))  # torch's own step counters are not part of a plan
    assert report(optimizer).state - steps <= dense * fraction


def test_a_smaller_budget_never_gives_a_larger_plan():
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    dense = 8 * sum(p.numel() for p in model.parameters())
    sizes = [
        plan(model, optimizer, Policy.for_budget(model, optimizer, int(dense * f))).bytes_after
        for f in (1.0, 0.5, 0.2, 0.1, 0.02)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_what_fits_is_kept_exactly():
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    dense = 8 * sum(p.numel() for p in model.parameters())
    policy = Policy.for_budget(model, optimizer, dense)
    assert {(rule.first_moment, rule.second_moment) for rule in policy.rules} == {(Keep(), Keep())}
    compress(optimizer, model, policy)
    assert plan(model, optimizer, policy).bytes_after == dense


def test_a_first_moment_goes_to_8_bits_before_it_is_dropped():
    model = nn.Sequential(nn.Embedding(5_000, 16), nn.Linear(16, 4_000))
    optimizer = torch.optim.AdamW(model.parameters())
    firsts = [
        [type(rule.first_moment).__name__ for rule in Policy.for_budget(model, optimizer, size).rules]
        for size in (680_000, 250_000, 150_000)
    ]
    assert firsts == [["Quantized"], ["Drop", "BFloat16"], ["Drop", "Quantized"]]


@pytest.mark.parametrize("sparse", [False, True])
def test_tables_go_down_the_same_way_whatever_their_gradients(sparse):
    model = nn.Embedding(5_000, 16, sparse=sparse)
    policy = Policy.for_budget(model, torch.optim.AdamW(model.parameters()), "25KB")
    assert [rule.second_moment for rule in policy.rules] == [Factored(floor=1.0)]


@pytest.mark.parametrize(("size", "tables"), [("90KB", Factored(floor=1.0)), ("75KB", RowWise(compression=10))])
def test_hidden_layers_go_before_the_last_step_of_tables(size, tables):
    model = nn.Sequential(nn.Embedding(5_000, 16, sparse=True), nn.Embedding(5_000, 16), nn.Linear(16, 4_000))
    optimizer = torch.optim.AdamW(model.parameters())
    policy = Policy.for_budget(model, optimizer, size)
    assert [rule.second_moment for rule in policy.rules] == [tables, Factored()]
    compress(optimizer, model, policy)


def test_an_impossible_budget_says_what_the_least_is():
    model = _model()
    with pytest.raises(ValueError, match=r"no policy fits 10 B: the smallest states are \d"):
        Policy.for_budget(model, torch.optim.AdamW(model.parameters()), 10)


@pytest.mark.parametrize(("size", "codec"), [("8MB", Keep()), ("4MB", BFloat16()), ("2MB", Quantized())])
def test_optimizers_without_a_rule_go_down_by_elements(size, codec):
    model = nn.Sequential(nn.Embedding(20_000, 32), nn.Linear(32, 32))
    optimizer = torch.optim.NAdam(model.parameters())
    policy = Policy.for_budget(model, optimizer, size)
    assert policy.rules[0].first_moment == policy.rules[0].second_moment == codec
    compress(optimizer, model, policy)
    with pytest.raises(ValueError, match="no policy fits"):
        Policy.for_budget(model, optimizer, "1MB")


def test_an_optimizer_without_states_has_nothing_to_compress():
    model = _model()
    with pytest.raises(ValueError, match=r"SGD keeps no states \(is momentum 0\?\)"):
        Policy.for_budget(model, torch.optim.SGD(model.parameters(), lr=0.1), "1GB")


def test_hidden_layers_alone():
    model = nn.Linear(64, 64)
    policy = Policy.for_budget(model, torch.optim.AdamW(model.parameters()), "20KiB")
    assert policy.rules[0].role == "hidden"


@pytest.mark.parametrize("size", ["much", "3 parsecs", "", "GiB"])
def test_a_size_is_a_number_with_a_unit(size):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is not a size"):
        Policy.for_budget(model, torch.optim.AdamW(model.parameters()), size)
