"""A few layers at a time: the dense states never exist all at once, where that does not change what a step is."""

from __future__ import annotations

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_sketch import Policy, Rule, compress, report
from lightning_sketch.optimizer import stock_layers as stock
from tests.stock.optimizers import LION, MUON, NADAM, PRODIGY, SCHEDULE_FREE
from tests.tiny import assert_same, give_gradients, train


class Deep(nn.Sequential):
    """Eight matrices of 1,024 bytes, and a vector."""

    def __init__(self) -> None:
        super().__init__(*[nn.Linear(16, 16, bias=i == 0) for i in range(8)])


EVERY_MATRIX = Policy([Rule(name="*.weight", first_moment="BFloat16", second_moment="BFloat16")])


def dense_at_once(model, optimizer, monkeypatch):
    """How many matrices have dense states while the optimizer's own step runs, at each of its runs."""
    found = []
    run = stock.stock_step.run

    def counted(stepped, *args):
        result = run(stepped, *args)
        states = [stepped.state.get(param, {}) for param in model.parameters() if param.ndim == 2]
        found.append(
            sum(any(getattr(x, "dtype", None) == torch.float32 and x.ndim == 2 for x in s.values()) for s in states)
        )
        return result

    monkeypatch.setattr(stock.stock_step, "run", counted)
    train(model, optimizer, [0])
    return found


@pytest.mark.parametrize("case", [NADAM, MUON, LION], ids=str)
def test_no_more_than_the_stated_bytes_are_decoded_at_once(case, monkeypatch):
    model = Deep()
    params = [p for p in model.parameters() if p.ndim == 2] if case is MUON else model.parameters()
    optimizer = compress(case.make(params), model, EVERY_MATRIX)
    states = 2 if case is NADAM else 1
    monkeypatch.setattr(stock, "PIECE_BYTES", 2 * 1024 * states)
    counts = dense_at_once(model, optimizer, monkeypatch)
    assert counts == ([] if case is MUON else [0]) + [2] * 4
    assert report(optimizer).transient >= 2 * 1024 * states
    assert all(x.dtype != torch.float32 for p in params if p.ndim == 2 for x in optimizer.state[p].values() if x.ndim)


def test_a_layer_above_the_limit_is_a_piece_by_itself(monkeypatch):
    model = Deep()
    optimizer = compress(NADAM.make(model.parameters()), model, EVERY_MATRIX)
    monkeypatch.setattr(stock, "PIECE_BYTES", 1)
    assert dense_at_once(model, optimizer, monkeypatch) == [0] + [1] * 8


@pytest.mark.parametrize("case", [NADAM, SCHEDULE_FREE, LION], ids=str)
def test_what_groups_count_is_counted_once_a_step(case, monkeypatch):
    monkeypatch.setattr(stock, "PIECE_BYTES", 1)
    models, optimizers = [], []
    for policy in (None, EVERY_MATRIX):
        torch.manual_seed(0)
        models.append(Deep())
        layers = list(models[-1].parameters())
        groups = [{"params": layers[:4]}, {"params": layers[4:], "lr": 0.003}]
        optimizers.append(case.make(groups))
        if policy:
            compress(optimizers[-1], models[-1], policy)
        train(models[-1], optimizers[-1], range(3))
    plain, ours = (
        [{k: v for k, v in g.items() if k not in ("params", "compression")} for g in o.param_groups] for o in optimizers
    )
    assert_same(ours, plain)
    assert torch.equal(models[0][0].bias, models[1][0].bias), "kept"


def test_an_optimizer_that_looks_at_all_layers_has_them_all(exactly, monkeypatch):
    """Prodigy estimates its step size from sums over all parameters."""
    from tests.stock.test_training import pair, parameters

    monkeypatch.setattr(stock, "PIECE_BYTES", 1)
    plain_model, plain, model, optimizer = pair(PRODIGY, exactly)
    train(plain_model, plain, range(5))
    train(model, optimizer, range(5))
    assert not optimizer.steps_apart
    assert optimizer.param_groups[0]["d"] == plain.param_groups[0]["d"]
    assert_same(parameters(model), parameters(plain_model))


class Clipping(torch.optim.NAdam):
    """Divides by the norm of all gradients where that is above 1."""

    @torch.no_grad()
    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        return super().step(closure)


class Twice(torch.optim.NAdam):
    """Evaluates its closure two times, as SAM and LBFGS do."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            return closure()


@pytest.mark.parametrize(
    ("made", "apart"),
    [
        (lambda p: torch.optim.NAdam(p), True),
        (lambda p: torch.optim.Muon(p), True),
        (lambda p: pytorch_optimizer.Adan(p), True),
        (lambda p: pytorch_optimizer.ScheduleFreeAdamW(p), True),
        (lambda p: pytorch_optimizer.Prodigy(p), False),
        (lambda p: pytorch_optimizer.DAdaptAdam(p), False),
        (lambda p: Clipping(p), False),
        (lambda p: Twice(p), False),
    ],
    ids=["NAdam", "Muon", "Adan", "ScheduleFree", "Prodigy", "DAdaptAdam", "Clipping", "Twice"],
)
def test_whether_a_step_is_made_up_of_pieces_is_found_out(made, apart):
    model = Deep()
    optimizer = compress(made([p for p in model.parameters() if p.ndim == 2]), model, EVERY_MATRIX)
    assert optimizer.steps_apart is apart


def test_a_closure_is_evaluated_as_often_as_the_optimizer_does():
    model = Deep()
    optimizer = compress(Twice(model.parameters()), model, EVERY_MATRIX)
    calls = []

    def closure():
        calls.append(give_gradients(model, len(calls)))
        return torch.tensor(float(len(calls)))

    assert optimizer.step(closure) == 2
    assert len(calls) == 2
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("apart", [True, False])
def test_a_step_that_fails_leaves_states_encoded(apart, monkeypatch):
    model = Deep()
    optimizer = compress(NADAM.make(model.parameters()), model, EVERY_MATRIX)
    train(model, optimizer, [0])
    optimizer.steps_apart = apart
    monkeypatch.setattr(torch.optim.NAdam, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, optimizer, [1])
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.bfloat16
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 9


def test_parameters_and_random_numbers_are_left_alone_by_the_trial():
    model = Deep()
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    optimizer = compress(LION.make(model.parameters()), model, EVERY_MATRIX)
    assert optimizer.steps_apart
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state
