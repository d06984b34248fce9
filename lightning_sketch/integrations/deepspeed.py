"""Bind a converted optimizer to a DeepSpeed engine by hand, where it cannot find the engine itself."""

from __future__ import annotations

from typing import Any

from lightning_sketch.layers.flat import FlatTensors
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding.wrapper import wrapper_of


def attach(engine: Any) -> FlatTensors | None:
    """Tell a converted optimizer which layers lie where in DeepSpeed's flat tensors.

    Seldom needed: the first ``step``, ``state_dict`` or ``load_state_dict`` finds its engine among its callers.

    Args:
        engine: what ``deepspeed.initialize`` returned first or second, or Accelerate's or Lightning's wrapper of it.

    Returns:
        what of each layer lies on this rank, of which ``str()`` is a table; ``None`` where the optimizer steps the
        model's parameters themselves (stage 0 in float32, and without DeepSpeed).

    Raises:
        TypeError: its optimizer is not a converted one: DeepSpeed or Accelerate
            replaced it.
        RuntimeError: DeepSpeed's layout cannot be read reliably.
    """
    wrapper, inner = wrapper_of(engine), unwrap(engine)
    if not isinstance(inner, CompressedOptimizer):
        raise TypeError(
            f"the engine optimizes with {type(inner).__name__}, not with a converted optimizer. Convert it with "
            "compress() before the engine is made; with optimizer offload, set zero_force_ds_cpu_optimizer=false in "
            "DeepSpeed's configuration, or DeepSpeedCPUAdam takes its place"
        )
    return None if wrapper is None else inner.bind(wrapper)
