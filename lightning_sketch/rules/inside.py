"""Which optimizer is inside what a trainer hands out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from lightning_sketch.rules.families import FAMILIES, Converted
from lightning_sketch.sharding.wrapper import wrapper_of


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside an AcceleratedOptimizer, a LightningOptimizer, or what DeepSpeed makes of one.

    Or inside an optimizer of any other class that holds one over its own parameter groups, as SAM does.

    Raises:
        TypeError: it is no optimizer, or there are several inside.
    """
    found = wrapper_of(optimizer)  # is no Optimizer, and Accelerate's wrapper may hide it
    optimizer = optimizer if found is None else found
    while (inner := _inside(optimizer)) is not None:
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def inner_optimizers(optimizer: Any) -> Iterator[tuple[str, Optimizer]]:
    """The optimizers that `optimizer` holds, in attributes or in lists and dictionaries there, and where."""
    for name, value in getattr(optimizer, "__dict__", {}).items():
        if name not in ("state", "param_groups", "defaults"):
            yield from ((name, found) for found in _optimizers_in(value, nested=2) if found is not optimizer)


def _inside(optimizer: Any) -> Optimizer | None:
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        return optimizer.optimizer  # type: ignore[no-any-return]
    if not isinstance(optimizer, Optimizer) or type(optimizer) in FAMILIES or isinstance(optimizer, Converted):
        return None
    own = {id(group) for group in getattr(optimizer, "param_groups", ())}
    held = {
        id(inner): (name, inner)
        for name, inner in inner_optimizers(optimizer)
        if any(id(group) in own for group in inner.param_groups)
    }
    if len(held) > 1:
        where = ", ".join(sorted(name for name, _ in held.values()))
        raise TypeError(f"{type(optimizer).__name__} holds several optimizers, in {where}; pass one of those")
    return next((inner for _, inner in held.values()), None)


def _optimizers_in(value: Any, nested: int) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif nested and isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _optimizers_in(item, nested - 1)
