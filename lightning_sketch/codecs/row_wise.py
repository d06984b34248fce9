"""One number per row, or fewer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec, CodecState, Count, Entry, Number, StateSpec, Tensors
from lightning_sketch.codecs.count_sketch import CountSketch
from lightning_sketch.codecs.decay import ScaledState, scale_tensor
from lightning_sketch.kernels.reference import over_rows, row_mean
from lightning_sketch.kernels.schema import KernelState, Kind
from lightning_sketch.sharding import Block, Shard


@dataclass(frozen=True)
class RowWise(Codec):
    """One second moment per row: the mean of ``g**2`` over the row.

    The state of row-wise Adagrad in recommender systems. With `compression` the row scalars themselves are kept in a
    count-min sketch ``[depth, width]``, below one float per row. Absent rows of a sparse gradient decay too (in
    constant time), as under dense gradients, unless `lazy`.

    Args:
        compression: how many times fewer numbers than rows; 1 keeps one per row.
        depth: hash functions of the sketch, when `compression` > 1.
        lazy: decay touched rows only, as ``torch.optim.SparseAdam`` does; under dense gradients all-zero rows count as
            absent.

    Raises:
        ValueError: an option is out of range.

    References:
        Mudigere et al., *Software-hardware co-design for fast and scalable training of deep learning recommendation
        models*, ISCA 2022, https://arxiv.org/abs/2104.05158 (row-wise Adagrad)
    """

    compression: float = 1.0
    depth: int = 3
    lazy: bool = False

    live_blocks: ClassVar[int] = 6
    refuses_signed: ClassVar[str | None] = (
        "one mean per row says nothing about the signs of its elements; choose Drop, BFloat16, CountSketch or Keep"
    )

    def __post_init__(self) -> None:
        self.sketch()  # validates the shared options
        if self.compression == 1 and self.depth != 3:
            raise ValueError(f"RowWise(depth={self.depth}) needs compression > 1: without it there is no sketch")

    def sketch(self) -> CountSketch:
        """The codec of the row scalars when `compression` > 1."""
        try:
            return CountSketch(compression=self.compression, depth=self.depth, lazy=self.lazy)
        except ValueError as error:
            raise ValueError(str(error).replace("CountSketch", "RowWise")) from None

    def row_table_shape(self, shard: Shard) -> tuple[int, int] | None:
        return self.sketch().table_shape(shard) if self.compression > 1 else None

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        if self.compression > 1:
            return self.sketch().allocate(_row_scalars(spec))
        return {"row": spec.zeros(spec.shard.local_rows), "scale": scale_tensor()}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"table": (None, None)} if self.compression > 1 else {"row": (0,)}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        if self.compression > 1:
            return _SketchedRows(spec, tensors, self.sketch().bind(_row_scalars(spec), tensors))
        return _Rows(spec, tensors, self.lazy)


class _Rows(ScaledState):
    row = Entry("row")  # [local_rows], the true value divided by the scale
    divided = ("row",)
    can_follow: ClassVar[bool] = True

    def __init__(self, spec: StateSpec, tensors: Tensors, lazy: bool) -> None:
        super().__init__(spec, tensors)
        self.lazy = lazy

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.weight = weight
        if self.lazy and rows is not None:
            self.decay_scale(1.0)
            self.row[rows] *= decay
        else:
            self.decay_scale(decay)

    def fusable(self) -> bool:
        return self.plain(self.row, self.spec.shard.local_rows)

    def to_kernel(self) -> KernelState:
        scale = self.scale
        return KernelState(Kind.ROW, self.row, None, 1.0, self.weight / scale, 0.0, scale)  # by position: half as long

    def add(self, block: Block, x: Tensor) -> None:
        self.row[block.index] += row_mean(x) * (self.weight / self.scale)

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.estimate(block)

    def estimate(self, block: Block) -> Tensor:
        return over_rows(self.row[block.index] * self.scale, len(self.spec.local_shape))


class _SketchedRows(CodecState):
    can_follow: ClassVar[bool] = True

    def __init__(self, spec: StateSpec, tensors: Tensors, inner: CodecState) -> None:
        super().__init__(spec, tensors)
        self.inner = inner
        # Of a step on an accelerator, where all rows are inserted and read at once.
        self.whole: Block | None = None
        self.means: list[Tensor] = []
        self.found: Tensor | None = None

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.whole, self.found = None, None
        self.means.clear()
        self.inner.deferred = self.deferred
        self.inner.begin(decay=decay, weight=weight, step=step, rows=rows)

    def fusable(self) -> bool:
        return self.inner.fusable()

    def deferred_scale(self) -> tuple[Tensor | None, float]:
        return self.inner.deferred_scale()

    def follow(self, leader: CodecState) -> None:
        self.inner.follow(leader)

    def rebound(self, seed: Any, tensors: Tensors) -> CodecState:
        other = super().rebound(seed, tensors)
        assert isinstance(other, _SketchedRows)
        other.inner, other.means = self.inner.rebound(seed, tensors), []
        return other

    def host_scale(self) -> float | None:
        return self.inner.host_scale()

    def take_scale(self, other: CodecState) -> None:
        assert isinstance(other, _SketchedRows)
        self.inner.take_scale(other.inner)

    def to_kernel(self) -> KernelState:
        inner = self.inner.to_kernel()
        return replace(inner, kind=Kind.ROW_SKETCH if inner.kind == Kind.SKETCH else Kind.ROW)

    def add(self, block: Block, x: Tensor) -> None:
        if block.whole is None:
            self.inner.add(block, row_mean(x))
        else:
            self.whole = block.whole
            self.means.append(row_mean(x))

    def settle(self) -> None:
        if self.whole is not None:
            self.inner.add(self.whole, torch.cat(self.means))
            self.means.clear()
            self.found = self.inner.estimate(self.whole)  # [k], of all rows of the gradient

    def read(self, block: Block, x: Tensor) -> Tensor:
        found = self.inner.estimate(block) if self.found is None else self.found[block.span]
        return over_rows(found, len(self.spec.local_shape))

    def commit(self) -> None:
        self.whole, self.found = None, None  # a bound state outlives the step

    def estimate(self, block: Block) -> Tensor:
        return over_rows(self.inner.estimate(block), len(self.spec.local_shape))


def _row_scalars(spec: StateSpec) -> StateSpec:
    """The spec of the column of row scalars."""
    shard = spec.shard
    scalars = Shard((shard.global_rows,), shard.row_offset, shard.local_rows, even_rows=shard.even_rows)
    return replace(spec, shard=scalars)
