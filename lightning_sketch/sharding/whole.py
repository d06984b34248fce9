"""Whole parameters: a single process, and every replica under DDP."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_sketch.sharding.base import Shard


def shard_of(param: Tensor, fqn: str) -> Shard:
    """The shard that `param` is.

    Raises:
        TypeError: `param` is a DTensor; sharded parameters are not supported.
    """
    # By name: importing torch.distributed.tensor costs half a second that a single process need not pay.
    if any(cls.__name__ == "DTensor" for cls in type(param).__mro__):
        raise TypeError(
            f"{fqn} is a DTensor (FSDP2 or tensor parallel). lightning_sketch compresses whole parameters only: "
            "use DDP, or keep this layer with a policy that does not match it"
        )
    shape = tuple(param.shape)
    return Shard(global_shape=shape, row_offset=0, local_rows=shape[0] if shape else 1)


def refuse_flattened(model: nn.Module) -> None:
    """Refuse a model under FSDP1, whose one-dimensional parameter shards cut rows and bear no mark of it.

    Raises:
        TypeError: `model` contains a ``FullyShardedDataParallel``.
    """
    if any(cls.__name__ == "FullyShardedDataParallel" for module in model.modules() for cls in type(module).__mro__):
        raise TypeError(
            "the model is under FullyShardedDataParallel (FSDP1), which flattens parameters into one-dimensional "
            "shards. lightning_sketch compresses whole parameters only: use DDP"
        )
