"""Where the numbers of steps stay on the device (``fused=True`` and SGD on CUDA), and what a graph would capture."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, AdamW

from lightning_sketch import CountSketch, Monitor, compress, kernels
from lightning_sketch.optimizer import on_device
from tests.monitor.test_shadow import assert_exact
from tests.tiny import Tiny, give_gradients, on_table

#: Stores every row by itself, and lets all decay.
EXACTLY = on_table(first_moment=CountSketch(width=1 << 20), second_moment=CountSketch(width=1 << 20))


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU be a device on which numbers stay. Its own kernels read them on the host."""
    monkeypatch.setattr(on_device, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: None)


def watched(make, **options):
    """The table alone: torch's own step wants a real device for the others."""
    model, monitor = Tiny(), Monitor(every=1)
    return model, compress(make(model.table.parameters(), **options), model.table, EXACTLY, monitor=monitor), monitor


def test_what_a_scaler_found_infinite_changes_nothing_and_gradients_are_unscaled():
    model, optimizer, monitor = watched(AdamW, fused=True)
    for step, overflows in enumerate((False, True, False, False)):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(float(overflows))
        give_gradients(model, step)
        model.table.weight.grad *= 512
        if overflows:
            model.table.weight.grad[3, 1] = torch.inf
        optimizer.step()
        assert_exact(monitor)
    assert optimizer.state[model.table.weight]["step"] == 3


def test_the_first_step_of_sgd_is_followed():
    model, optimizer, monitor = watched(SGD, lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
        assert_exact(monitor)


def test_a_step_that_is_captured_is_refused_before_anything_changes(monkeypatch):
    model, optimizer, _ = watched(SGD, lr=0.1, momentum=0.9)
    give_gradients(model, 0)
    optimizer.step()
    before = model.table.weight.detach().clone()
    monkeypatch.setattr("lightning_sketch.monitor.watch.capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"under a monitor cannot be captured.*detach"):
        optimizer.step()
    assert torch.equal(model.table.weight, before)
