"""Find DeepSpeed's optimizer wrapper: among the callers of an optimizer, or inside what trainers make of an engine.

By class and module names: DeepSpeed is never imported.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer


def find_wrapper(optimizer: Optimizer) -> tuple[Any | None, bool]:
    """Find who called, from inside ``optimizer.step()``.

    Returns:
        DeepSpeed's wrapper whose client is `optimizer`, looked for in the calling frames, or None; and whether this is
        the step with zero gradients that ``FP16_UnfusedOptimizer`` makes while it is constructed, to have the states
        allocated.

    Raises:
        RuntimeError: the engine around the wrapper is to load universal checkpoints.
    """
    found, trial = None, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Asking a frame for its locals makes it hold on to them until it returns, which in a training loop would be
        # the activations: only DeepSpeed's own frames are asked.
        if _is_deepspeed(frame.f_globals.get("__name__")):
            caller: Any = frame.f_locals.get("self")
            if found is None and _is_wrapper(caller) and caller.optimizer is optimizer:
                found, trial = caller, frame.f_code.co_name == "initialize_optimizer_states"
            _refuse_universal(caller)
        frame = frame.f_back
    return found, trial


def wrapper_of(engine_or_wrapper: Any) -> Any | None:
    """DeepSpeed's optimizer wrapper inside an engine, or inside what Accelerate makes of either.

    Args:
        engine_or_wrapper: a ``DeepSpeedEngine``, its ``.optimizer``, or Accelerate's ``DeepSpeedEngineWrapper`` or
            ``DeepSpeedOptimizerWrapper``.

    Returns:
        the wrapper, or None if there is none: stage 0 in fp32 steps the client itself.

    Raises:
        RuntimeError: the engine is to load universal checkpoints.
    """
    found, seen = engine_or_wrapper, set()
    while found is not None and id(found) not in seen:
        if _is_wrapper(found):
            return found
        _refuse_universal(found)
        seen.add(id(found))
        inner = vars(found).get("engine") if hasattr(found, "__dict__") else None
        found = inner if inner is not None else getattr(found, "optimizer", None)
    return None


def _is_deepspeed(module: Any) -> bool:
    return isinstance(module, str) and module.split(".")[0] == "deepspeed"


def _is_wrapper(candidate: Any) -> bool:
    # The engine, an nn.Module, has an `optimizer` too.
    made_by = any(_is_deepspeed(cls.__module__) for cls in type(candidate).__mro__)
    return made_by and not isinstance(candidate, nn.Module | Optimizer) and hasattr(candidate, "optimizer")


def _refuse_universal(engine: Any) -> None:
    # Only the engine knows, and it fills the client's state without asking the client.
    asked = getattr(engine, "load_universal_checkpoint", None) if isinstance(engine, nn.Module) else None
    if callable(asked) and asked():
        refuse_format("universal", "checkpoint.load_universal")


def refuse_format(name: str, setting: str) -> NoReturn:
    """Raise RuntimeError for a kind of checkpoint that cannot hold our states."""
    raise RuntimeError(
        f"DeepSpeed's {name} checkpoints cut states of any other shape than the parameter's, or leave them out: set "
        f"{setting} to false. Checkpoints of another world size or ZeRO stage are loaded by "
        "lightning_sketch.restore(engine, directory)"
    )
