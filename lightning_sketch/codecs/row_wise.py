"""One number per row, or fewer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.count_sketch import CountSketch, LinearSketch
from lightning_sketch.codecs.decay import ScaledState, scale_tensor
from lightning_sketch.codecs.shared import Shared, Sharing
from lightning_sketch.codecs.state import CodecState, Count, Entry, Number, StateSpec, Tensors, add_scaled
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.reference import over_rows, row_mean
from lightning_sketch.kernels.schema import KernelState
from lightning_sketch.sharding import Block, Cut, Shard
from lightning_sketch.sharding.base import BLOCK_NUMEL


@dataclass(frozen=True)
class RowWise(Codec):
    """One second moment per row: the mean of ``g**2`` over the row.

    The state of row-wise Adagrad in recommender systems. With `compression` the row scalars themselves are kept in a
    count-min sketch ``[depth, width]``, below one float per row. Absent rows of a sparse gradient decay too (in
    constant time), as under dense gradients, unless `lazy`.

    Where ranks divide the parameter, the scalars are those of one process: a row that lies on several ranks has one,
    and the sketch is of all rows, on every rank.

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
        "one mean per row says nothing about the signs of its elements; choose Drop, Quantized, BFloat16 or Keep"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sketch()  # validates the shared options
        if self.compression == 1 and self.depth != 3:
            raise ValueError(f"RowWise(depth={self.depth}) needs compression > 1: without it there is no sketch")

    def sketch(self) -> CountSketch:
        """The codec of the row scalars when `compression` > 1."""
        try:
            return CountSketch(compression=self.compression, depth=self.depth, lazy=self.lazy, sync=True)
        except ValueError as error:
            raise ValueError(str(error).replace("CountSketch", "RowWise")) from None

    def row_table_shape(self, shard: Shard) -> tuple[int, int] | None:
        return self.sketch().table_shape(_scalars(shard)) if self.compression > 1 else None

    def wider(self, shard: Shard) -> RowWise | None:
        if self.compression == 1:
            return None
        if (sketch := self.sketch().wider(_scalars(shard))) is None:
            return None
        if sketch.width is not None:  # a number for each row
            return replace(self, compression=1.0, depth=3)
        return replace(self, compression=sketch.compression)

    def sharing(self, shape: tuple[int, ...], cut: Cut) -> Sharing | None:
        rows, whole = cut != "rows", 0
        if self.compression > 1 and (found := self.sketch().sharing(shape[:1], cut)) is not None:
            whole = found.whole
        return Sharing(rows, whole, lazy=self.lazy) if rows or whole else None

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        if self.compression > 1:
            return self.sketch().allocate(_row_scalars(spec))
        return {"row": spec.zeros(spec.shard.local_rows), "scale": scale_tensor()}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"table": (None, None)} if self.compression > 1 else {"row": (0,)}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        if self.compression > 1:
            return _SketchedRows(spec, tensors, LinearSketch(self.sketch(), _row_scalars(spec), tensors))
        return _Rows(spec, tensors, self.lazy)


class _Rows(ScaledState):
    row = Entry("row")  # [local_rows], the true value divided by the scale
    divided = ("row",)
    can_follow: ClassVar[bool] = True
    takes_sums: ClassVar[bool] = True

    def __init__(self, spec: StateSpec, tensors: Tensors, lazy: bool) -> None:
        super().__init__(spec, tensors)
        self.lazy = lazy

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.weight = weight
        shared, self.shared = self.shared, None
        self.observed = shared is not None and shared.rows is not None
        if self.lazy and rows is not None:
            self.decay_scale(1.0)
            if shared is None or shared.touched_rows is None:
                self.row[rows] *= decay
            else:
                self.row.mul_(torch.where(shared.touched_rows > 0, decay, 1.0))
        else:
            self.decay_scale(decay)
        if shared is not None and shared.rows is not None:
            add_scaled(self.row, shared.rows, weight / self.scale)

    def observe(self, block: Block, x: Tensor) -> None:
        self.observe_sums(block, row_mean(x), None)

    def observe_sums(self, block: Block, means: Tensor, columns: Tensor | None) -> None:
        if self.shared is not None:
            _observe_rows(self.shared, block, means)

    def fusable(self) -> bool:
        return self.plain(self.row, self.spec.shard.local_rows)

    def to_kernel(self) -> KernelState:
        scale = self.scale
        weight = 0.0 if self.observed else self.weight / scale
        return KernelState(Kind.ROW, self.row, None, 1.0, weight, 0.0, scale)  # by position: half as long

    def add(self, block: Block, x: Tensor) -> None:
        if not self.observed:
            self.row[block.index] += row_mean(x) * (self.weight / self.scale)

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.estimate(block)

    def estimate(self, block: Block) -> Tensor:
        return over_rows(self.row[block.index] * self.scale, len(self.spec.local_shape))


class _SketchedRows(CodecState):
    can_follow: ClassVar[bool] = True
    takes_sums: ClassVar[bool] = True

    def __init__(self, spec: StateSpec, tensors: Tensors, inner: LinearSketch) -> None:
        super().__init__(spec, tensors)
        self.inner = inner
        # Of a step on an accelerator, or one that ranks agree on, where all rows are inserted at once.
        self.whole: Block | None = None
        self.means: list[Tensor] = []
        self.found: Tensor | None = None

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.whole, self.found = None, None
        self.means.clear()
        self.inner.deferred = self.deferred
        shared, self.shared = self.shared, None
        self.inner.shared = shared
        self.inner.begin(decay=decay, weight=weight, step=step, rows=rows)
        self.observed = shared is not None and (shared.rows is not None or shared.whole is not None)
        if shared is not None and shared.all_rows is not None:
            self._add_shared_rows(shared, weight / self.inner.scale)

    def _add_shared_rows(self, shared: Shared, weight: Number) -> None:
        # Each of them goes into the sketch, whoever holds it; an exact table has the shard's own rows only.
        if self.inner.exact:
            if shared.rows is not None:
                own = slice(0, self.spec.shard.local_rows)
                self.inner.insert(Block(self.inner.spec.shard, own, own), shared.rows, weight)
        elif shared.all_rows is not None:
            everywhere = Shard.whole((self.spec.shard.global_rows,))
            for span in _spans(shared.all_rows.numel()):
                index = span if shared.ids is None else shared.ids[span]
                self.inner.insert(Block(everywhere, index, span), shared.all_rows[span], weight)

    def observe(self, block: Block, x: Tensor) -> None:
        if (shared := self.shared) is None:
            return
        if shared.rows is not None:
            _observe_rows(shared, block, row_mean(x))
        elif shared.whole is not None:
            self.means.append(row_mean(x))

    def finish_observing(self, rows: Tensor | None) -> None:
        if self.means:
            means = torch.cat(self.means)
            self.means.clear()
            self._observe_whole(slice(0, means.numel()) if rows is None else rows, means)

    def observe_sums(self, block: Block, means: Tensor, columns: Tensor | None) -> None:
        if (shared := self.shared) is None:
            return
        if shared.rows is not None:
            _observe_rows(shared, block, means)
        elif shared.whole is not None:
            self._observe_whole(block.index, means)

    def _observe_whole(self, rows: slice | Tensor, means: Tensor) -> None:
        self.inner.shared = self.shared
        for span in _spans(means.numel()):  # of many rows: the blocks of a wide gradient have few
            index = span if isinstance(rows, slice) else rows[span]
            self.inner.observe(Block(self.inner.spec.shard, index, span), means[span])

    def fusable(self) -> bool:
        return self.inner.is_plain()

    def deferred_scale(self) -> tuple[Tensor | None, float]:
        return self.inner.deferred_scale()

    @property
    def renormalized(self) -> bool:
        return self.inner.renormalized

    def follow(self, leader: CodecState) -> None:
        self.inner.follow(leader)

    def rebound(self, seed: Any, tensors: Tensors) -> Self:
        other = super().rebound(seed, tensors)
        other.inner, other.means = self.inner.rebound(seed, tensors), []
        return other

    def host_scale(self) -> float | None:
        return self.inner.host_scale()

    def take_scale(self, other: CodecState) -> None:
        assert isinstance(other, _SketchedRows)
        self.inner.take_scale(other.inner)

    def to_kernel(self) -> KernelState:
        inner = self.inner.to_kernel()
        kind = Kind.ROW_SKETCH if inner.kind == Kind.SKETCH else Kind.ROW
        return replace(inner, kind=kind, weight=0.0 if self.observed else inner.weight)

    def add(self, block: Block, x: Tensor) -> None:
        if self.observed:
            return
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


def _spans(rows: int) -> Iterator[slice]:
    """Rows whose hashes are in memory at once."""
    for start in range(0, rows, BLOCK_NUMEL):
        yield slice(start, min(start + BLOCK_NUMEL, rows))


def _row_scalars(spec: StateSpec) -> StateSpec:
    """The spec of the column of row scalars."""
    return replace(spec, shard=_scalars(spec.shard))


def _scalars(shard: Shard) -> Shard:
    """The shard of the column of row scalars."""
    return Shard((shard.global_rows,), shard.row_offset, shard.local_rows, even_rows=shard.even_rows, cut=shard.cut)


def _observe_rows(shared: Shared, block: Block, means: Tensor) -> None:
    """Add to the shared means of rows; of a row that is cut, what is here is a part of its mean."""
    if shared.rows is not None:
        shared.rows[block.index] += means * (block.shard.row_numel / block.shard.whole_row_numel)
    if shared.touched_rows is not None:
        shared.touched_rows[block.index] += 1
