"""Optimizers without an update rule of ours, and how far BFloat16 states may take them from where they go without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch import BFloat16, Policy, Rule


class Matrices(nn.Module):
    """Matrices only, because Muon takes nothing else; prescribed gradients reach all of them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 4, dtype=dtype)
        self.hidden = nn.Linear(4, 6, bias=False, dtype=dtype)
        self.kept = nn.Linear(6, 5, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.kept(self.hidden(self.table(tokens)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """An optimizer class without a rule.

    Args:
        distance: of parameters after 20 steps with BFloat16 states from those without, relative to how far they went.
    """

    cls: type[Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    distance: float = 0.02

    def make(self, params: Iterable[Any], **kwargs: Any) -> Any:
        return self.cls(params, **self.kwargs | kwargs)  # type: ignore[call-arg]

    def __str__(self) -> str:
        return f"{self.cls.__module__.split('.')[0]}.{self.cls.__name__}"


MUON = Case(torch.optim.Muon, {"lr": 0.02})
NADAM = Case(torch.optim.NAdam, {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True})
LION = Case(pytorch_optimizer.Lion, {"lr": 0.01}, distance=0.1)
SCHEDULE_FREE = Case(pytorch_optimizer.ScheduleFreeAdamW, {"lr": 0.05})
PRODIGY = Case(pytorch_optimizer.Prodigy, {"lr": 1.0})
TORCH = (
    NADAM, MUON, Case(torch.optim.RAdam, {"lr": 0.05}), Case(torch.optim.Adamax, {"lr": 0.05}),
    Case(torch.optim.Adadelta), Case(torch.optim.Rprop), Case(torch.optim.ASGD),
)  # fmt: skip
CASES = (*TORCH, LION, SCHEDULE_FREE, Case(pytorch_optimizer.Adan, {"lr": 0.05}))

#: Codecs for everything that an optimizer keeps of the table and of one hidden matrix.
BF16 = Policy([Rule(name=["table.*", "hidden.*"], first_moment=BFloat16(), second_moment=BFloat16())])
