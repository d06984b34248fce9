"""What changes between two steps and does not fit is refused, before anything changes, or put right."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.optim import AdamW, RMSprop

from lightning_sketch import SM3, CountSketch, Factored, Policy, RowWise, Rule, compress
from lightning_sketch.layers.record import LayerPart
from tests.optimizer.layers_tools import give, make_layers
from tests.tiny import assert_same, snapshot


def test_a_state_asked_for_later_is_refused_before_anything_changes():
    model = nn.Linear(8, 20, bias=False)
    policy = Policy([Rule(name="*", second_moment=RowWise())])
    optimizer = compress(RMSprop(model.parameters()), model, policy)
    for step in range(3):
        model.weight.grad = torch.ones(20, 8)
        if step == 2:
            optimizer.param_groups[0]["momentum"] = 0.9
            before = snapshot(model, optimizer)
            with pytest.raises(ValueError, match=r"weight was compressed without momentum_buffer"):
                optimizer.step()
            assert_same(snapshot(model, optimizer), before)
        else:
            optimizer.step()


def test_a_shape_that_changes_later_is_refused_before_anything_changes():
    model = nn.Linear(8, 20, bias=False)
    optimizer = compress(AdamW(model.parameters()), model, Policy([Rule(name="*", second_moment=RowWise())]))
    model.weight.grad = torch.ones(20, 8)
    optimizer.step()
    model.weight.grad = None
    model.weight.data = torch.ones(20, 4)
    model.weight.grad = torch.ones(20, 4)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"weight now has shape \[20, 4\], but its states were laid out for \[20, 8\]"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("codec", [RowWise(), CountSketch(width=5), SM3(), Factored()], ids=repr)
def test_states_of_another_dtype_or_size_are_not_taken_by_kernels(codec):
    """They would write beyond them."""
    for change in (lambda x: x.bfloat16(), lambda x: x.flatten()[: x.numel() // 2]):
        model = nn.Linear(8, 20, bias=False)
        optimizer = compress(AdamW(model.parameters()), model, Policy([Rule(name="weight", second_moment=codec)]))
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        state = optimizer.state[model.weight]
        for key, old in [(key, x) for key, x in state.items() if key.startswith("exp_avg_sq_") and x.ndim]:
            values = change(old)
            beyond = torch.zeros(4 * values.numel(), dtype=values.dtype)  # its first quarter becomes the state
            beyond[: values.numel()] = values.flatten()
            state[key] = beyond[: values.numel()].view(values.shape)
            with contextlib.suppress(ValueError):  # another dtype is cast back, another size refused
                optimizer.step()
            assert (beyond[values.numel() :] == 0).all()
            state[key] = old


def test_a_sketch_of_another_width_under_the_same_tensor_is_refused_before_anything_changes():
    """It would be read beyond its end."""
    model, optimizer = make_layers()
    give(model, 0)
    optimizer.step()
    optimizer.state[model.l0.weight]["exp_avg_table"].data = torch.zeros(3, 2, 8)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"l0.weight: its exp_avg_table .* \[3, 2, 8\] .*, expected .* \[3, 4, 8\]"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_hyperparameters_that_are_none_leave_step_counts_alone():
    model, optimizer = make_layers()
    give(model, 0)
    optimizer.step()
    counts = {id(state): float(state["step"]) for state in optimizer.state.values()}
    for param in model.parameters():  # a kept layer's step would raise before
        if not any(key.startswith("exp_avg_sq_") for key in optimizer.state[param]):
            param.grad = None
    optimizer.param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()
    assert {id(state): float(state["step"]) for state in optimizer.state.values()} == counts


def test_a_step_count_written_as_a_number_goes_on():
    model, optimizer = make_layers()
    give(model, 0)
    optimizer.step()
    for count in (5, torch.tensor(5)):
        optimizer.state[model.l0.weight]["step"] = count
        optimizer.step()
        assert optimizer.state[model.l0.weight]["step"] == 6


def test_states_that_did_not_fit_are_allocated_by_the_next_step(monkeypatch):
    model, optimizer = make_layers()
    give(model, 0)
    allocate = LayerPart.allocate

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(LayerPart, "allocate", out_of_memory)
    with pytest.raises(MemoryError):
        optimizer.step()
    monkeypatch.setattr(LayerPart, "allocate", allocate)
    optimizer.step()
    assert all(float(state["step"]) >= 1 for state in optimizer.state.values())
