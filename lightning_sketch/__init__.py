"""Optimizer-state compression for PyTorch.

``optimizer = compress(optimizer, model)`` converts the optimizer you already have;
``Trainer(callbacks=[OptimizerStateCompression()])`` does it in Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_sketch.checkpoints import restore
from lightning_sketch.codecs import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    ElementwiseCodec,
    Factored,
    Keep,
    Quantized,
    RowWise,
)
from lightning_sketch.estimate import estimate_memory
from lightning_sketch.integrations.deepspeed import attach
from lightning_sketch.layers.transcode import decompress_state_dict
from lightning_sketch.memory import report
from lightning_sketch.optimizer.convert import compress, decompress
from lightning_sketch.optimizer.reset import reset_states
from lightning_sketch.optimizer.resize import resize_states
from lightning_sketch.policy.policy import Policy, default_policy, plan
from lightning_sketch.policy.rule import Rule

if TYPE_CHECKING:
    from lightning_sketch.integrations.lightning import OptimizerStateCompression as OptimizerStateCompression
    from lightning_sketch.monitor import Monitor as Monitor

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "BFloat16",
    "Codec",
    "CountSketch",
    "Drop",
    "ElementwiseCodec",
    "Factored",
    "Keep",
    "Policy",
    "Quantized",
    "RowWise",
    "Rule",
    "attach",
    "compress",
    "decompress",
    "decompress_state_dict",
    "default_policy",
    "estimate_memory",
    "plan",
    "report",
    "reset_states",
    "resize_states",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "OptimizerStateCompression":  # lazily: lightning is optional, and slow to import
        from lightning_sketch.integrations.lightning import OptimizerStateCompression

        return OptimizerStateCompression
    if name == "Monitor":  # lazily: few want one
        from lightning_sketch.monitor import Monitor

        return Monitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
