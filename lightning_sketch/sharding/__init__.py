"""Which rows of a logical parameter the tensor on this rank holds. One file per engine."""

from lightning_sketch.sharding.base import Block, Shard
from lightning_sketch.sharding.whole import refuse_flattened, shard_of

__all__ = ["Block", "Shard", "refuse_flattened", "shard_of"]
