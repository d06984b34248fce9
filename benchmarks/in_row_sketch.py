"""The count-min sketch that the count-sketch paper's released code keeps of dense layers (`dense_exp_cms.py`).

One hash function puts the elements of a row, its columns, into a fifth as many buckets; rows keep to themselves. A step
divides by a bucket with the element's own square alone folded in, and then the bucket takes in the squares of all its
elements. It is here for reproduction: the package hashes whole rows, which suits tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs import Codec, CodecState, StateSpec, Tensors
from lightning_sketch.kernels.reference import hash_rows
from lightning_sketch.sharding import Block


@dataclass(frozen=True)
class InRowSketch(Codec):
    """A table ``[rows, columns / compression]`` for second moments.

    Args:
        compression: columns to a bucket, on average.
    """

    compression: float = 5.0

    refuses_signed: ClassVar[str | None] = "it has no signs"

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        width = max(1, int(spec.shard.row_numel / self.compression))
        return {"table": spec.zeros(spec.shard.local_rows, width)}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"table": (0, None)}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return _InRowSketch(spec, tensors)


class _InRowSketch(CodecState):
    """Expects dense gradients."""

    adds_values: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    def __init__(self, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(spec, tensors)
        self.table: Tensor = self["table"]
        columns = torch.arange(spec.shard.row_numel, device=self.table.device)
        self.bucket = hash_rows(columns, spec.seed, 1, self.table.shape[1])[0][0]  # [columns]

    def begin(self, *, decay: Any, weight: Any, step: Any, rows: Tensor | None) -> None:
        self.decay, self.weight = decay, weight

    def read(self, block: Block, x: Tensor) -> Tensor:
        added = x.flatten(1) * self.weight
        rows = self.table[block.index] * self.decay
        found = rows[:, self.bucket] + added
        self.table[block.index] = rows.index_add_(1, self.bucket, added)
        read: Tensor = found.view_as(x)
        return read

    def estimate(self, block: Block) -> Tensor:
        found: Tensor = self.table[block.index][:, self.bucket]
        return found.view(-1, *self.spec.shard.row_shape)
