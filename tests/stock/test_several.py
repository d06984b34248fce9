"""Several optimizers of one model, converted in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch import BFloat16, Factored, Policy, RowWise, Rule, compress, report
from tests.tiny import assert_same

#: The tables are AdamW's, the hidden matrices Muon's.
POLICY = Policy(
    [
        Rule(role="embedding", first_moment=BFloat16(), second_moment=RowWise()),
        Rule(role="hidden", first_moment=BFloat16()),
    ]
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.hidden = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.hidden(self.table(tokens)) @ self.table.weight.T  # type: ignore[no-any-return]


def make() -> tuple[Net, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = Net()
    others = [model.table.weight, model.hidden.bias]
    return model, [torch.optim.Muon([model.hidden.weight], lr=0.02), torch.optim.AdamW(others, lr=0.01)]


def test_one_call_compresses_all_and_returns_them():
    model, pair = make()
    found = compress(pair, model, POLICY)
    assert type(found) is list
    assert all(a is b for a, b in zip(found, pair, strict=True))
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(torch.arange(8)), torch.arange(8) + 1)
        for optimizer in found:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in found:
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    muon, adamw = found
    assert muon.state[model.hidden.weight]["momentum_buffer"].dtype == torch.bfloat16
    assert adamw.state[model.table.weight]["exp_avg_sq_row"].shape == (40,)
    assert report(muon).state_by_codec["BFloat16"] == 2 * 8 * 8


def test_what_the_policy_compresses_counts_over_all():
    model, pair = make()
    tables = Policy([POLICY.rules[0]])
    compress(tuple(pair), model, tables)  # Muon has none of it
    other_model, (muon, _) = make()
    with pytest.raises(ValueError, match=r"table.weight: not in the optimizer"):
        compress(muon, other_model, tables)


def test_what_one_refuses_changes_none():
    model, pair = make()
    with pytest.raises(ValueError, match=r"Drop cannot hold momentum_buffer of hidden.weight"):
        compress(pair[::-1], model, Policy([POLICY.rules[0], Rule(role="hidden", first_moment="Drop")]))
    assert [type(x) for x in pair] == [torch.optim.Muon, torch.optim.AdamW]


def test_a_codec_for_what_one_of_them_does_not_keep_is_no_error():
    """Muon keeps no second moment."""
    model, pair = make()
    policy = Policy([POLICY.rules[0], Rule(role="hidden", first_moment=BFloat16(), second_moment=Factored())])
    compress(pair, model, policy)


def test_one_call_is_as_two():
    models = []
    for together in (True, False):
        model, pair = make()
        models.append(model)
        if together:
            compress(pair, model, POLICY)
        else:
            for optimizer in pair:
                compress(optimizer, model, POLICY)
        for _ in range(3):
            model(torch.arange(8)).square().mean().backward()
            for optimizer in pair:
                optimizer.step()
    assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))


def test_no_optimizers_is_an_error():
    with pytest.raises(ValueError, match="empty list of optimizers"):
        compress([], Net(), POLICY)
