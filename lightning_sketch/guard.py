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


def refuse_zero_redundancy(optimizer: Any) -> None:
    """Refuse torch's ``ZeroRedundancyOptimizer``, whose inner optimizer has some layers of the model on every rank.

    When it loads, it copies the options of one rank's groups over those of all others, and the states past the inner
    optimizer; where only the rank that has a layer finds its gradient not finite, the others would wait for it.

    Raises:
        TypeError: it is one.
    """
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise TypeError(
            "ZeroRedundancyOptimizer cannot be compressed, nor the optimizer inside: when it loads, it gives every "
            "rank the decisions about one rank's layers. To divide compressed states among ranks, use FSDP2 "
            "(fully_shard) or DeepSpeed's ZeRO-1; under DistributedDataParallel, compress a plain torch optimizer"
        )


def _refuse_foreign_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if isinstance(getattr(optimizer, "optim", None), CompressedOptimizer):
        refuse_zero_redundancy(optimizer)  # compress() saw the inner one only
    records = [record for group in optimizer.param_groups for record in group.get(RECORDS) or ()]
    if isinstance(optimizer, CompressedOptimizer) or all(record is None for record in records):
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
