"""Refuse the step of a plain optimizer over groups that we compressed."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_sketch.layers.record import RECORDS
from lightning_sketch.optimizer import stock_step
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.rules.inside import inner_optimizers

#: Optimizers that were found to work with a converted one.
_allowed: WeakSet[Optimizer] = WeakSet()


@functools.cache  # once for the process
def guard_foreign_steps() -> None:
    """From now on, an optimizer that is not converted raises when it steps groups that are compressed.

    A plain optimizer that loaded a compressed checkpoint would fail later, and obscurely. One that an engine built over
    our groups in our place would train without us, silently: DeepSpeedCPUAdam, under Accelerate with optimizer offload.
    It holds our groups, the very same dictionaries; but a wrapper that delegates holds our optimizer.
    """
    register_optimizer_step_pre_hook(_before_step)


def refuse_zero_redundancy(optimizer: Any) -> None:
    """Refuse torch's ``ZeroRedundancyOptimizer``, whose inner optimizer has some layers of the model on every rank.

    When it loads, it copies the options of one rank's groups over those of all others, and the states past the inner
    optimizer.

    Raises:
        TypeError: it is one.
    """
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise TypeError(
            "ZeroRedundancyOptimizer cannot be compressed, nor the optimizer inside: when it loads, it gives every "
            "rank the decisions about one rank's layers. To divide compressed states among ranks, use FSDP2 "
            "(fully_shard) or DeepSpeed's ZeRO-1; under DistributedDataParallel, compress a plain torch optimizer"
        )


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    if isinstance(optimizer, CompressedGroups):
        return stock_step.redirect(optimizer, args, kwargs)
    if isinstance(getattr(optimizer, "optim", None), CompressedGroups):
        refuse_zero_redundancy(optimizer)  # compress() saw the inner one only
    records = [record for group in optimizer.param_groups for record in group.get(RECORDS) or ()]
    if optimizer in _allowed or all(record is None for record in records):
        return None
    held = _all_inside(optimizer)
    if any(isinstance(inner, CompressedGroups) for inner in held):
        _allowed.update([optimizer, *held])  # those beside ours, too, where a wrapper has several over the same groups
        return None
    raise RuntimeError(
        f"{type(optimizer).__name__} steps parameter groups that lightning_sketch compressed. If it loaded a "
        "compressed checkpoint: convert the optimizer with compress(optimizer, model, policy) before loading, or "
        "make the checkpoint plain with decompress_state_dict(state_dict) or `lightning-sketch convert`. If an "
        "engine put it in place of the converted optimizer: with DeepSpeed's optimizer offload, set "
        "zero_force_ds_cpu_optimizer=false in its configuration. If it is meant to step beside the converted "
        "optimizer: give it groups of its own, [dict(group) for group in groups] made before compress()"
    )


def _all_inside(optimizer: Optimizer) -> list[Optimizer]:
    found: list[Optimizer] = []
    waiting = [optimizer]
    while waiting:
        inner = [held for _, held in inner_optimizers(waiting.pop()) if all(held is not known for known in found)]
        found += inner
        waiting += inner
    return found
