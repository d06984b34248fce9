"""Lightning's files number parameters by their places in the optimizer, or, of sharded models, in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_sketch import BFloat16, Policy, Rule, compress, restore


class ThreeLayers(nn.Module):
    """Three layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2, bias=False) for _ in range(3))


def converted(*groups: str) -> tuple[ThreeLayers, Any]:
    """An optimizer over groups of layers; each letter is a layer."""
    model = ThreeLayers()
    optimizer = AdamW([{"params": [getattr(model, name).weight for name in group]} for group in groups])
    return model, compress(optimizer, model, Policy([Rule(name="b.*", exp_avg=BFloat16())]))


def plain_file(path: Path, numbers: list[list[int]]) -> Path:
    """A Lightning checkpoint of a plain AdamW; the first moment of a parameter is full of its number."""

    def moments(number: int) -> dict[str, Any]:
        return {"step": torch.tensor(5.0), "exp_avg": torch.full((2, 3), float(number)), "exp_avg_sq": torch.ones(2, 3)}

    options = {
        key: value for key, value in AdamW([nn.Parameter(torch.zeros(1))]).param_groups[0].items() if key != "params"
    }
    state = {number: moments(number) for group in numbers for number in group}
    states = {"state": state, "param_groups": [options | {"params": group} for group in numbers]}
    torch.save({"optimizer_states": [states]}, path)
    return path


def first_moments(model: ThreeLayers, optimizer: Optimizer) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in "abc":
        value = optimizer.state[getattr(model, name).weight]["exp_avg"]
        assert isinstance(value, Tensor)
        found[name] = float(value.float().mean())
    return found


def test_in_the_models_order_the_two_numberings_are_one(tmp_path: Path) -> None:
    model, optimizer = converted("abc")
    restore(optimizer, plain_file(tmp_path / "file.ckpt", [[0, 1, 2]]))
    assert first_moments(model, optimizer) == {"a": 0, "b": 1, "c": 2}


def test_numbers_that_are_places_in_the_model(tmp_path: Path) -> None:
    model, optimizer = converted("ca", "b")
    restore(optimizer, plain_file(tmp_path / "file.ckpt", [[0, 2], [1]]))
    assert first_moments(model, optimizer) == {"a": 0, "b": 1, "c": 2}


def test_numbers_that_may_be_either_are_refused(tmp_path: Path) -> None:
    _, optimizer = converted("bac")
    with pytest.raises(ValueError, match="nothing says by which"):
        restore(optimizer, plain_file(tmp_path / "file.ckpt", [[0, 1, 2]]))
    assert not any(optimizer.state.values())
