"""The stock class's step, and how a converted optimizer's own step and it stand in for each other.

Both have torch's step hooks around them. Wrappers that users put on an optimizer or on its class hold the one that was
there at that time: it is run where the other one is meant.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_sketch.optimizer.groups import CompressedGroups

StepT = TypeVar("StepT", bound=Callable[..., Any])
_HOOK_WRAPPER = Optimizer.profile_hook_step(lambda: None).__code__


def with_hooks(step: StepT) -> StepT:
    """Have torch's hooks run around a converted optimizer's step, and note on the optimizer that it is running."""
    hooked = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: CompressedGroups, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "compression"):  # decompressed, and called by who bound its step before
            return type(self).step(self, *args, **kwargs)
        compression = self.compression
        if compression.stepping:
            return hooked(self, *args, **kwargs)
        compression.stepping = True
        try:
            return hooked(self, *args, **kwargs)
        finally:
            compression.stepping = False

    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def redirect(
    optimizer: CompressedGroups, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments with which the stock class's step, about to run on a converted optimizer, does the converted step.

    A step that was bound before the conversion is the stock class's: who wrapped it calls that. Given an optimizer
    without parameters and our step as its closure, it does ours, between torch's hooks, and returns our loss.

    Returns:
        the arguments; ``None`` if it is the optimizer's own step, or another function with torch's hooks around it.
    """
    if optimizer.compression.stepping or not _runs_step_of(optimizer.stock):
        return None
    nothing = optimizer.stock.__new__(optimizer.stock)
    nothing.__dict__.update({**vars(optimizer), "state": {}, "param_groups": []})
    step = type(optimizer).step.__wrapped__  # type: ignore[attr-defined]
    return (nothing, functools.partial(step, optimizer, *args[1:], **kwargs)), {}


def run(optimizer: CompressedGroups, *args: Any) -> Any:
    """Run the stock class's step, as it is now, without torch's step hooks: those run around ours. What it returned."""
    step: Callable[..., Any] = optimizer.stock.step
    while getattr(step, "hooked", None) is True and _is_torch(step):  # torch.compile wraps that of SparseAdam once more
        step = step.__wrapped__  # type: ignore[attr-defined]
    if _is_torch(step):
        return step(optimizer, *args)
    # Someone wrapped it, around hooks that we cannot reach, or mocked it.
    with _no_hooks(optimizer):
        bound = step.__get__(optimizer, type(optimizer)) if hasattr(type(step), "__get__") else step
        return bound(*args)


def _runs_step_of(stock: type[Optimizer]) -> bool:
    """Whether the innermost call of torch's hook wrapper, which does not say so, is around that class's step."""
    frame = sys._getframe(1)
    while frame.f_code is not _HOOK_WRAPPER:
        if frame.f_back is None:  # compiled: what torch.compile was given is a step
            return True
        frame = frame.f_back
    name = getattr(frame.f_locals["func"], "__qualname__", None)
    return any(name == f"{cls.__qualname__}.step" for cls in stock.__mro__)  # AdamW's is Adam's


def _is_torch(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("torch.")


@contextmanager
def _no_hooks(optimizer: Optimizer) -> Iterator[None]:
    every: list[MutableMapping[Any, Any]] = [
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    ]
    kept = [dict(hooks) for hooks in every]
    for hooks in every:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(every, kept, strict=True):
            hooks.update(before)
