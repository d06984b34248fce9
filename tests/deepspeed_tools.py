"""DeepSpeed engines on CPU ranks that `run_ranks` has started."""

from __future__ import annotations

import gc
import os
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer


def init_deepspeed(rank: int, world_size: int) -> None:
    """Join DeepSpeed to the process group that exists already. Call once on every rank, before anything else."""
    # Without these DeepSpeed looks for MPI. The address is never used.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # Else it is compiled, for more than a minute; only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    # DeepSpeed collects garbage several times for each engine: spare it the search through all that was imported.
    import_module("torch._dynamo")  # which the first optimizer would import
    gc.freeze()


def config(stage: int, dtype: str = "fp32", more: dict[str, Any] | None = None, **zero_options: Any) -> dict[str, Any]:
    """A DeepSpeed configuration for tiny models.

    Args:
        stage: ZeRO stage, 0 to 3.
        dtype: of the parameters: ``"fp32"``, ``"bf16"`` or ``"fp16"``. The loss is not scaled.
        more: further keys on the top level.
        zero_options: further keys of ``zero_optimization``.
    """
    # Small buckets: those of stage 3 are allocated in advance.
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 2000, "allgather_bucket_size": 2000}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else parameters this small are never partitioned
    precision = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 1}}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default clips at 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | zero_options,
        **precision[dtype],
        **(more or {}),
    }


def engine(
    model: nn.Module,
    optimizer: Optimizer,
    stage: int,
    dtype: str = "fp32",
    more: dict[str, Any] | None = None,
    lr_scheduler: Any = None,
    **zero_options: Any,
) -> Any:
    """The ``DeepSpeedEngine`` that trains `model`; the other arguments are those of `config`.

    Args:
        lr_scheduler: of torch, over `optimizer`.

    Returns:
        the engine. ``engine.optimizer`` is DeepSpeed's wrapper, whose client is `optimizer`.
    """
    import deepspeed

    if dtype == "fp16":  # which DeepSpeed refuses on CPUs without the instructions for it; torch emulates them
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    settings = config(stage, dtype, more, **zero_options)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, lr_scheduler=lr_scheduler)[0]
