"""Refuse the step of a plain optimizer over groups that we compressed."""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_sketch.classes import unwrap
from lightning_sketch.layer import RECORDS
from lightning_sketch.optimizer import CompressedOptimizer


@functools.cache  # once for the process
def guard_foreign_steps() -> None:
    """From now on, an optimizer that is not converted raises when it steps groups that are.

    A plain optimizer that loaded a compressed checkpoint would fail later, and obscurely. One that an engine built over
    our groups in our place would train without us, silently: DeepSpeedCPUAdam, under Accelerate with optimizer offload.
    """
    register_optimizer_step_pre_hook(_refuse_foreign_step)


def _refuse_foreign_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if isinstance(optimizer, CompressedOptimizer) or not any(RECORDS in group for group in optimizer.param_groups):
        return
    inner = unwrap(optimizer)
    if not isinstance(inner, CompressedOptimizer):
        raise RuntimeError(
            f"{type(inner).__name__} steps parameter groups that lightning_sketch compressed. If it loaded a "
            "compressed checkpoint: convert the optimizer with compress(optimizer, model, policy) before loading, or "
            "make the checkpoint plain with decompress_state_dict(state_dict) or `lightning-sketch convert`. If an "
            "engine put it in place of the converted optimizer: with DeepSpeed's optimizer offload, set "
            "zero_force_ds_cpu_optimizer=false in its configuration"
        )
