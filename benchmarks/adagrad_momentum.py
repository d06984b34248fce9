"""Adagrad with momentum, which SM3 is an approximation of; torch's Adagrad has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTUM = 0.9


class AdagradMomentum(Optimizer):
    r"""The step is a mean of preconditioned gradients: :math:`m \leftarrow 0.9 m + 0.1 g / \sqrt{\sum g^2}`."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["sum"], state["momentum_buffer"] = torch.zeros_like(param), torch.zeros_like(param)
                state["sum"].addcmul_(param.grad, param.grad)
                update = param.grad / state["sum"].sqrt().add_(group["eps"])
                param.sub_(state["momentum_buffer"].lerp_(update, 1 - MOMENTUM), alpha=group["lr"])
