"""`Shard`: the part of a logical parameter that lives here. `Block`: some of its rows, few enough to stay in cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

# Elements handled at once by the reference kernels. 2**18 fp32 numbers are 1 MiB, so a block and its few temporaries
# stay in the L2 cache of one core, and a step's temporaries do not grow with the table.
BLOCK_NUMEL = 1 << 18
# The same on accelerators, where every call launches a kernel: blocks of at least so many elements, and at most so many
# blocks, so that launches do not grow with the table, and temporaries are a fraction of it. Codecs of many operations
# say fewer blocks (`Codec.accelerator_blocks`).
ACCELERATOR_BLOCK_NUMEL = 1 << 24
ACCELERATOR_BLOCKS = 16

T = TypeVar("T")
CPU = torch.device("cpu")

#: How ranks divide a parameter: by rows, by columns, or anywhere within a row.
Cut = Literal["rows", "columns", "anywhere"]


def rows_at_once(device: torch.device, rows: int, row_numel: int, most_blocks: int = ACCELERATOR_BLOCKS) -> int:
    """Rows of `row_numel` elements that the reference kernels handle at once on a device, of `rows` in all.

    Args:
        most_blocks: into how many blocks they may be cut on an accelerator.
    """
    if device.type == "cpu":
        return max(1, BLOCK_NUMEL // max(1, row_numel))
    return max(1, ACCELERATOR_BLOCK_NUMEL // max(1, row_numel), -(-rows // most_blocks))


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
        even_columns: `row_numel` of the fullest shard, likewise, where columns are cut. ``None`` for `row_numel`.
        cut: how the parameter is divided over ranks that agree, in every step, on what they add to states that they
            share (`codecs.shared`); ``None`` where this shard keeps all of its states by itself.
    """

    global_shape: tuple[int, ...]
    row_offset: int
    local_rows: int
    part_shape: tuple[int, ...] | None = None
    column_offset: int = 0
    even_rows: int | None = None
    even_columns: int | None = None
    cut: Cut | None = None

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
    def table_columns(self) -> int:
        """Number of elements of a row that tables are laid out for."""
        return self.row_numel if self.even_columns is None else self.even_columns

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one local row: the trailing dimensions, or the part of them that is held here."""
        return self.global_shape[1:] if self.part_shape is None else self.part_shape

    @cached_property
    def row_numel(self) -> int:
        numel: int = math.prod(self.row_shape)
        return numel

    @property
    def is_cut_row(self) -> bool:
        """Whether it is some columns of a row that ranks which agree have cut anywhere."""
        return self.cut == "anywhere" and self.part_shape is not None

    @cached_property
    def whole_row_numel(self) -> int:
        """Number of elements of a row of the logical parameter."""
        numel: int = math.prod(self.global_shape[1:])
        return numel

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """``(local_rows, *row_shape)``."""
        return (self.local_rows, *self.row_shape)

    def as_rows(self, tensor: Tensor) -> Tensor:
        """View the local parameter (or a tensor of as many elements) as ``[local_rows, *row_shape]``."""
        return tensor if tensor.shape == self.local_shape else tensor.view(self.local_shape)

    def blocks(
        self, rows: Tensor | None = None, device: torch.device = CPU, most_blocks: int = ACCELERATOR_BLOCKS
    ) -> Iterator[Block]:
        """Cut all local rows, or the given ones, into blocks.

        Args:
            rows: local row ids, int64 ``[k]`` without duplicates; ``None`` for all rows in order.
            device: where the values are: blocks are as large as suits it.
            most_blocks: how many there may be on an accelerator.
        """
        total = self.local_rows if rows is None else rows.numel()
        if self.row_numel == 0:
            total = 0  # rows without elements: maxima and means over them do not exist
        size = rows_at_once(device, total, self.row_numel, most_blocks)
        everything = slice(0, total)
        whole = None
        if device.type != "cpu":
            whole = Block(self, everything if rows is None else rows, everything, remembers=True, cut_into=size)
        for start in range(0, total, size):
            span = slice(start, min(start + size, total))
            yield Block(self, span if rows is None else rows[span], span, whole)


@dataclass(frozen=True)
class Block:
    """Some rows of a shard.

    Args:
        shard: the shard the rows belong to.
        index: the local rows, as a slice (contiguous) or as int64 ``[k]`` without duplicates.
        span: where these rows lie in the gradient's values.
        whole: on accelerators, all rows of the gradient: what codecs want to know of rows is made for all of them at
            once, and remembered there for as long as a block of them is alive.
        remembers: whether `memo` remembers contiguous rows, too.
        cut_into: of `whole`, how many rows each block has; the last may have fewer.
        good: False for what is left out of a step, whose values are 0: bool ``[k, 1, ...]`` by row, or
            ``[k, *row_shape]`` by element; ``None`` for nothing. States of such rows (elements) stay as they are.
    """

    shard: Shard
    index: slice | Tensor
    span: slice
    whole: Block | None = None
    remembers: bool = False
    cut_into: int = 0
    good: Tensor | None = field(default=None, compare=False, repr=False)
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

    def of_rows(
        self, key: object, device: torch.device, make: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make` says of the rows, given their global ids, int64 ``[k]``: tensors ``[..., k]``.

        Args:
            key: as in `memo`.
            device: where the row ids are to be.
        """
        if self.whole is None:
            return self.memo(key, lambda: make(self.row_ids(device)))
        of_all = self.whole.of_rows(key, device, make)
        return tuple(each[..., self.span] for each in of_all)

    def memo(self, key: object, make: Callable[[], T]) -> T:
        """Remember `make()` under `key` for sparse blocks, whose hashes are asked for two to four times a step.

        Contiguous blocks recompute instead: there the hash is small beside the row, and remembering it for every block
        of a table would be a table-sized temporary. On accelerators it is the launches that count.
        """
        if isinstance(self.index, slice) and not self.remembers:
            return make()
        if key not in self._memo:
            self._memo[key] = make()
        found: T = self._memo[key]
        return found
