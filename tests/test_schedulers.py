"""Learning-rate schedulers, made before or after the conversion, see the optimizer they know."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_sketch import compress, decompress
from tests.tiny import EXACTLY, LOSSY, Tiny, assert_same, snapshot, train

SCHEDULERS = {
    "StepLR": lambda o: StepLR(o, step_size=2, gamma=0.5),
    "LambdaLR": lambda o: LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), ExponentialLR(o, 0.7)], milestones=[2]),
    "ChainedScheduler": lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.7)]),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.3),
}
METRICS = (1.0, 0.9, 1.5, 1.6, 0.1, 0.2)


def run(model, optimizer, scheduler, steps):
    """Train and schedule; the hyperparameters at every step."""
    seen = []
    for step in steps:
        train(model, optimizer, [step])
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(METRICS[step])
        else:
            scheduler.step()
    return seen


def make(cls, params):
    return SGD(params, lr=0.1, momentum=0.9) if cls is SGD else AdamW(params, lr=0.1)


@pytest.mark.parametrize("cls", [AdamW, SGD])
@pytest.mark.parametrize("when", ["scheduler first", "conversion first", "conversion in mid-training", "to and fro"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedule_and_what_it_does_are_those_of_the_plain_optimizer(name, when, cls):
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, stock = make(cls, model.parameters()), make(cls, plain.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*lr_scheduler\.step\(\).*")  # ... before optimizer.step()
        if when == "conversion first":
            compress(optimizer, model, EXACTLY)
        scheduler = SCHEDULERS[name](optimizer)
        if when == "scheduler first":
            compress(optimizer, model, EXACTLY)
        seen = run(model, optimizer, scheduler, range(3))
        if when in ("conversion in mid-training", "to and fro"):
            compress(optimizer, model, EXACTLY)
        if when == "to and fro":
            decompress(optimizer)
        seen += run(model, optimizer, scheduler, range(3, 6))
    assert seen == run(plain, stock, SCHEDULERS[name](stock), range(6))
    assert len({lr for lr, _, _ in seen}) > 2
    torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_schedule_that_runs_ahead_of_the_optimizer_is_still_noticed(when):
    model = Tiny()
    optimizer = AdamW(model.parameters())
    if when == "before":
        scheduler = StepLR(optimizer, 1)
    compress(optimizer, model, LOSSY)
    if when == "after":
        scheduler = StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_a_tensor_learning_rate_is_changed_in_place_and_obeyed(cls):
    found = []
    for lr in (0.1, torch.tensor(0.1)):
        torch.manual_seed(0)
        model = Tiny()
        kwargs = {"momentum": 0.9} if cls is SGD else {}
        optimizer = compress(cls(model.parameters(), lr=lr, foreach=False, **kwargs), model, EXACTLY)
        run(model, optimizer, StepLR(optimizer, 1, gamma=0.5), range(4))
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 / 16)
        found.append(model.table.weight)
        assert optimizer.param_groups[0]["lr"] is lr or not isinstance(lr, torch.Tensor)
    torch.testing.assert_close(*found)


def test_a_resumed_scheduler_goes_on():
    model = Tiny()
    optimizer = compress(AdamW(model.parameters(), lr=0.1), model, LOSSY)
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    run(model, optimizer, scheduler, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    expected = run(model, optimizer, scheduler, range(3, 6))

    resumed = Tiny()
    again = compress(AdamW(resumed.parameters(), lr=0.1), resumed, LOSSY)
    scheduler = StepLR(again, 2, gamma=0.5)
    for target, state in zip((resumed, again, scheduler), saved, strict=True):
        target.load_state_dict(state)
    assert run(resumed, again, scheduler, range(3, 6)) == expected
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))
