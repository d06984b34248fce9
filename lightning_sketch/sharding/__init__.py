"""Which part of a logical parameter the tensor on this rank holds. One file per engine."""

from lightning_sketch.sharding.base import Block, Cut, Shard
from lightning_sketch.sharding.dtensor import is_dtensor, local, placed_like, show_shards
from lightning_sketch.sharding.whole import global_shape, kept_shard_of, refuse_flattened, shard_of

__all__ = [
    "Block",
    "Cut",
    "Shard",
    "global_shape",
    "is_dtensor",
    "kept_shard_of",
    "local",
    "placed_like",
    "refuse_flattened",
    "shard_of",
    "show_shards",
]
