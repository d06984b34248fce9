"""A second moment for each row that needs no eps: to each is added a multiple of the mean over the table's rows.

A prototype for :mod:`benchmarks.lstm_lm` and :mod:`benchmarks.extreme`, of sparse gradients on one process and without
a first moment; no part of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class FlooredRows(Optimizer):
    """``param -= lr * g / (sqrt(v + floor * mean(v)) + eps)``, ``v [rows]`` the means of ``g**2`` over a row.

    Args:
        decay: of `v` in each step; 1 for sums that do not decay, as Adagrad's.
        corrects_bias: as Adam does.
        floor: how often the mean of `v` over all rows, those without a gradient so far too, is added.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, eps: float = 1e-8, decay: float, corrects_bias: bool, floor: float
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        self._decay = decay
        self._corrects_bias = corrects_bias
        self._floor = floor
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        self._steps += 1
        correction = 1 - self._decay**self._steps if self._corrects_bias else 1.0
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
