"""`Shard`: the part of a logical parameter that lives here. `Block`: some of its rows, few enough to stay in cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

# Elements handled at once by the reference kernels. 2**18 fp32 numbers are 1 MiB, so a block and its few temporaries
# stay in the L2 cache of one core, and a step's temporaries do not grow with the table.
BLOCK_NUMEL = 1 << 18

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """The part of a logical parameter that a local tensor holds: rows along dimension 0, of all or some columns.

    Codecs see only ``(row ids, values, shard)``; they never ask which engine made the shard.

    Args:
        global_shape: shape of the logical parameter. 0-d parameters count as one row of shape ``()``.
        row_offset: global id of the first local row.
        local_rows: number of rows held here.
        part_shape: shape of what is held of each row; ``None`` for whole rows.
        column_offset: how many elements of the flattened row come before those held here.
        even_rows: `local_rows` of the fullest shard, when shards are of unequal size: tables are laid out for it, so
            that all ranks' tables have one shape. ``None`` for `local_rows`.
    """

    global_shape: tuple[int, ...]
    row_offset: int
    local_rows: int
    part_shape: tuple[int, ...] | None = None
    column_offset: int = 0
    even_rows: int | None = None

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Shard:
        """All of a parameter."""
        return cls(shape, row_offset=0, local_rows=shape[0] if shape else 1)

    @property
    def global_rows(self) -> int:
        return self.global_shape[0] if self.global_shape else 1

    @property
    def table_rows(self) -> int:
        """Number of rows that tables are laid out for."""
        return self.local_rows if self.even_rows is None else self.even_rows

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one local row: the trailing dimensions, or the part of them that is held here."""
        return self.global_shape[1:] if self.part_shape is None else self.part_shape

    @cached_property
    def row_numel(self) -> int:
        numel: int = math.prod(self.row_shape)
        return numel

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """``(local_rows, *row_shape)``."""
        return (self.local_rows, *self.row_shape)

    def as_rows(self, tensor: Tensor) -> Tensor:
        """View the local parameter (or a tensor of as many elements) as ``[local_rows, *row_shape]``."""
        return tensor if tensor.shape == self.local_shape else tensor.view(self.local_shape)

    def blocks(self, rows: Tensor | None = None) -> Iterator[Block]:
        """Cut all local rows, or the given ones, into blocks.

        Args:
            rows: local row ids, int64 ``[k]`` without duplicates; ``None`` for all rows in order.
        """
        total = self.local_rows if rows is None else rows.numel()
        if self.row_numel == 0:
            total = 0  # rows without elements: maxima and means over them do not exist
        size = max(1, BLOCK_NUMEL // max(1, self.row_numel))
        for start in range(0, total, size):
            span = slice(start, min(start + size, total))
            yield Block(self, span if rows is None else rows[span], span)


@dataclass(frozen=True)
class Block:
    """Some rows of a shard.

    Args:
        shard: the shard the rows belong to.
        index: the local rows, as a slice (contiguous) or as int64 ``[k]`` without duplicates.
        span: where these rows lie in the gradient's values.
    """

    shard: Shard
    index: slice | Tensor
    span: slice
    _memo: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        return int(self.span.stop) - int(self.span.start)

    def local_ids(self, device: torch.device) -> Tensor:
        """Local ids of the rows, int64 ``[k]``."""
        if isinstance(self.index, slice):
            return torch.arange(self.index.start, self.index.stop, device=device)
        return self.index

    def row_ids(self, device: torch.device) -> Tensor:
        """Global ids of the rows, int64 ``[k]``."""
        return self.local_ids(device) + self.shard.row_offset

    def memo(self, key: object, make: Callable[[], T]) -> T:
        """Remember `make()` under `key` for sparse blocks, whose hashes are asked for two to four times a step.

        Contiguous blocks recompute instead: there the hash is small beside the row, and remembering it for every block
        of a table would be a table-sized temporary.
        """
        if isinstance(self.index, slice):
            return make()
        if key not in self._memo:
            self._memo[key] = make()
        found: T = self._memo[key]
        return found
