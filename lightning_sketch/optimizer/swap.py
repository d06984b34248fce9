"""Another class for the same optimizer, and everything that torch and trainers derived from the old one."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch.optim import Optimizer

from lightning_sketch.rules.inside import unwrap

#: Wrappers that make a class of their own and the optimizer's, and what they put in front of its name.
_IMITATORS = {"LightningOptimizer": "Lightning", "_FabricOptimizer": "Fabric"}


def swap_class(optimizer: Optimizer, cls: type[Optimizer]) -> None:
    """Change the class of the same object, and everything that torch derived from the old class."""
    # An LRScheduler freezes the old class's step on the instance, and Accelerate binds it there. Anything else there is
    # a user's wrapper, and stays: the step that it calls is redirected (`stock_step`).
    frozen = optimizer.__dict__.get("step")
    scheduled = getattr(frozen, "_wrapped_by_lr_sched", False) is True
    if getattr(frozen, "__wrapped__" if scheduled else "__func__", None) is type(optimizer).step:
        del optimizer.step
    else:
        scheduled = False
    optimizer.__class__ = cls
    optimizer._patch_step_function()  # step hooks live in a wrapper around the class's step
    # fused=True makes GradScaler leave unscaling to the step; compressed layers do it where numbers stay on the device.
    optimizer.__dict__.pop("_step_supports_amp_scaling", None)
    if scheduled:
        _wrap_for_scheduler(optimizer)


def _wrap_for_scheduler(optimizer: Optimizer) -> None:
    """What torch.optim.lr_scheduler does to an optimizer, so that it can warn about the order of step calls."""
    reference = weakref.ref(optimizer)
    function = optimizer.step.__func__  # type: ignore[attr-defined]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        live = reference()
        live._opt_called = True  # type: ignore[union-attr]
        return function.__get__(live, type(live))(*args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = wrapper  # type: ignore[method-assign]


def refresh_wrapper(optimizer: Any) -> None:
    """Everything that a trainer's wrapper derived from the old class of the optimizer inside."""
    if hasattr(optimizer, "_optimizer_original_step_method"):
        optimizer.__setstate__({})  # an AcceleratedOptimizer with a GradScaler keeps bound steps; this binds them anew
    # Lightning's and Fabric's wrappers imitate the class of the optimizer inside, so that isinstance checks work.
    for own in type(optimizer).__mro__:
        if prefix := _IMITATORS.get(own.__name__):
            inner = type(unwrap(optimizer))
            optimizer.__class__ = type(prefix + inner.__name__, (own, inner), {})
            return
