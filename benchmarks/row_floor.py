"""A second moment for each row that needs no eps: to each is added a multiple of the mean over the table's rows.

A prototype for :mod:`benchmarks.lstm_lm` and :mod:`benchmarks.extreme`, of sparse gradients on one process and without
a first moment; no part of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Family = Literal["momentum", "adam", "adagrad", "rmsprop"]
DECAY = 0.999


class FlooredRows(Optimizer):
    """``param -= lr * g / (sqrt(v + floor * mean(v)) + eps)``, ``v [rows]`` the means of ``g**2`` over a row.

    Args:
        family: how squares are summed up: with decay and Adam's correction of bias, with decay, or without ("adagrad").
        floor: how often the mean of `v` over all rows, those without a gradient so far too, is added.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, eps: float, family: Family, floor: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        self._decay = 1.0 if family == "adagrad" else DECAY
        self._corrects = family == "adam"
        self._floor = floor
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        self._steps += 1
        correction = 1 - self._decay**self._steps if self._corrects else 1.0
        weight = 1 - self._decay if self._decay < 1 else 1.0
        for group in self.param_groups:
            for param in group["params"]:
                gradient = param.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                state = self.state[param]
                if not state:
                    state["rows"] = torch.zeros(len(param))
                second = state["rows"].mul_(self._decay)
                second.index_add_(0, rows, values.square().mean(1), alpha=weight)
                floored = (second[rows] + self._floor * second.mean()) / correction
                param.index_add_(0, rows, values / (floored.sqrt() + group["eps"])[:, None], alpha=-group["lr"])
