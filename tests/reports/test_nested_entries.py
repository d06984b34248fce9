"""Optimizers whose ``state_dict`` wraps some of their states, as bitsandbytes' does, or keeps codes of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch import BFloat16, Policy, Quantized, Rule, compress, decompress_state_dict
from tests.tiny import assert_same

WRAPPED = "__state__"
LARGE = 512  # elements


class Wrapping(Optimizer):
    """A momentum; of large parameters in bytes, which no codec takes."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                if not state:
                    coded = param.numel() >= LARGE
                    state["step"] = 0
                    state["mean"] = torch.zeros_like(param, dtype=torch.int8 if coded else None)
                state["step"] += 1
                mean = state["mean"].float() / (100 if state["mean"].dtype == torch.int8 else 1)
                mean = mean.lerp(param.grad.clamp(-1, 1), 0.1)
                state["mean"].copy_((mean * 100).round() if state["mean"].dtype == torch.int8 else mean)
                param.sub_(mean, alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        found["state"] = {
            key: {k: v for k, v in entry.items() if k != "mean"} | {WRAPPED: {"mean": entry["mean"]}}
            if "mean" in entry
            else entry
            for key, entry in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = copy.deepcopy(state_dict)
        for entry in state_dict["state"].values():
            entry.update(entry.pop(WRAPPED, {}))
        super().load_state_dict(state_dict)
        for param, entry in self.state.items():  # torch casts them
            if param.numel() >= LARGE and "mean" in entry:
                entry["mean"] = entry["mean"].to(torch.int8)


def make(codec: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.ParameterDict({"small": nn.Parameter(torch.randn(20, 16)), "large": nn.Parameter(torch.randn(40, 16))})
    optimizer = Wrapping(model.parameters())
    return model, optimizer if codec is None else compress(optimizer, model, Policy([Rule(first_moment=codec)]))


def train(model: nn.Module, optimizer: Any, steps: range) -> dict[str, Tensor]:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("codec", [BFloat16(stochastic=False), Quantized(block=16)], ids=str)
def test_a_compressed_run_resumes(codec):
    model, optimizer = make(codec)
    train(model, optimizer, range(3))
    other, again = make(codec)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert_same(train(other, again, range(3, 6)), train(model, optimizer, range(3, 6)))


@pytest.mark.parametrize("codec", [BFloat16(stochastic=False), Quantized(block=16)], ids=str)
def test_plain_states_move_into_codecs_and_back(codec):
    model, plain = make(None)
    train(model, plain, range(3))
    other, optimizer = make(codec)
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    third, back = make(None)
    third.load_state_dict(model.state_dict())
    back.load_state_dict(decompress_state_dict(optimizer.state_dict()))
    for name, param in model.items():
        found, expected = back.state[third[name]]["mean"], plain.state[param]["mean"]
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)
    train(other, optimizer, range(3, 4))
    train(third, back, range(3, 4))
