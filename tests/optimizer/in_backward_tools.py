"""Backward passes that give a model's parameters prescribed gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch import Policy, compress
from tests.tiny import ADAMW, EXACTLY, Case, Tiny, give_gradients


class _Prescribed(torch.autograd.Function):
    """A scalar whose gradient with respect to a parameter is a given tensor, sparse ones too."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *factor: Tensor) -> tuple[Tensor, None]:
        return ctx.grad * factor[0], None


def loss_of(model: nn.Module, step: int, *, sparse: bool = False) -> Tensor:
    """A loss whose gradients are those of `give_gradients`; frozen parameters have none."""
    before = [param.grad for param in model.parameters()]
    give_gradients(model, step, sparse=sparse)
    terms = []
    for param, old in zip(model.parameters(), before, strict=True):
        if param.requires_grad:
            terms.append(_Prescribed.apply(param, param.grad))
        param.grad = old
    return torch.stack(terms).sum()


def make(policy: Policy = EXACTLY, case: Case = ADAMW, *, in_backward: bool = True, **options: Any) -> tuple[Tiny, Any]:
    """`Tiny` with the same weights every time, and its converted optimizer."""
    torch.manual_seed(0)
    model = Tiny()
    return model, compress(case.make(model.parameters()), model, policy, step_in_backward=in_backward, **options)


def train(
    model: nn.Module,
    optimizer: Any,
    steps: Iterable[int],
    *,
    sparse: bool = False,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """Backward and step.

    Args:
        after: called after every step.
    """
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, sparse=sparse).backward()
        optimizer.step()
        after()
