"""Whole parameters: a single process, and every replica under DDP."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_sketch.sharding import dtensor
from lightning_sketch.sharding.base import Shard


def global_shape(param: Tensor) -> tuple[int, ...]:
    """Shape of the logical parameter, however little of it is held here."""
    # DeepSpeed's zero.Init and ZeRO-3 leave an empty tensor behind and keep the shape beside it.
    return tuple(getattr(param, "ds_shape", param.shape))


def shard_of(param: Tensor, fqn: str) -> Shard:
    """The shard that an optimizer's `param` is: a DTensor's local part, or all of it.

    Raises:
        TypeError: `param` is a DTensor of placements that are not supported.
    """
    return dtensor.shard_of(param, fqn) if dtensor.is_dtensor(param) else Shard.whole(tuple(param.shape))


def kept_shard_of(param: Tensor, fqn: str) -> Shard:
    """`shard_of` a parameter that no codec serves: a DTensor may be cut by rows and by columns at once.

    Raises:
        TypeError: `param` is a DTensor that is cut along another dimension.
    """
    return dtensor.kept_shard_of(param, fqn) if dtensor.is_dtensor(param) else Shard.whole(tuple(param.shape))


def refuse_flattened(model: nn.Module) -> None:
    """Refuse a model under FSDP1, whose one-dimensional parameter shards cut rows and bear no mark of it.

    Raises:
        TypeError: `model` contains a ``FullyShardedDataParallel``.
    """
    if any(cls.__name__ == "FullyShardedDataParallel" for module in model.modules() for cls in type(module).__mro__):
        raise TypeError(
            "the model is under FullyShardedDataParallel (FSDP1), which flattens parameters into one-dimensional "
            "shards, and whose checkpoints hold states of the parameters' own shape only. Use FSDP2 "
            "(torch.distributed.fsdp.fully_shard), which shards by rows, or DDP"
        )
