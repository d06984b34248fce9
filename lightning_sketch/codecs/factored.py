"""Row means and column means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_sketch.codecs.base import Codec, CodecState, Count, Entry, Number, StateSpec, Tensors, add_scaled
from lightning_sketch.codecs.decay import ScaledState, scale_tensor
from lightning_sketch.kernels.reference import over_rows, row_mean
from lightning_sketch.kernels.schema import KernelState, Kind
from lightning_sketch.sharding import Block, Shard


@dataclass(frozen=True)
class Factored(Codec):
    r"""A rank-1 second moment :math:`\hat v_{ij} = r_i c_j / \bar c` of row means :math:`r`, column means :math:`c`.

    Dimension 0 is the rows; all others together are the columns, so a tensor ``[n, a, b]`` keeps ``n + a b`` numbers.
    Row and column means are linear in the dense state, so absent rows of a sparse gradient decay exactly as under dense
    gradients, in constant time.

    References:
        Shazeer and Stern, *Adafactor*, ICML 2018, https://arxiv.org/abs/1804.04235, Algorithm 2
    """

    live_blocks: ClassVar[int] = 7
    refuses_signed: ClassVar[str | None] = (
        "a product of row and column means holds non-negative values only; choose Drop, BFloat16, CountSketch or Keep"
    )

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        row, col = spec.zeros(spec.shard.local_rows), spec.zeros(*spec.shard.row_shape)
        return {"row": row, "col": col, "scale": scale_tensor()}

    def scratch_per_row(self, shard: Shard) -> int:
        return 5  # the mean square of each, and whether it is left out

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"row": (0,), "col": tuple(range(1, ndim))}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return _Factored(spec, tensors)


class _Factored(ScaledState):
    row = Entry("row")  # [local_rows], divided by the scale
    col = Entry("col")  # row_shape, divided by the scale
    divided = ("row", "col")
    can_follow: ClassVar[bool] = True

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.weight = weight / self.decay_scale(decay)

    def add(self, block: Block, x: Tensor) -> None:
        self.row[block.index] += row_mean(x) * self.weight
        add_scaled(self.col, x.sum(dim=0), self.weight / max(1, self.spec.shard.global_rows))

    def fusable(self) -> bool:
        shard = self.spec.shard
        return self.plain(self.row, shard.local_rows) and self.plain(self.col, shard.row_numel)

    def to_kernel(self) -> KernelState:
        column_weight = self.weight / max(1, self.spec.shard.global_rows)
        return KernelState(Kind.FACTORED, self.row, self.col, 1.0, self.weight, column_weight, self.scale)

    def settle(self) -> None:
        self.shape = self._shape()

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self._product(block, self.shape)

    def commit(self) -> None:
        del self.shape  # a bound state outlives the step

    def estimate(self, block: Block) -> Tensor:
        return self._product(block, self._shape())

    def _shape(self) -> Tensor:
        return (self.col / self.col.mean()).nan_to_num_(nan=0.0)  # 0/0 := 0 before the first gradient

    def _product(self, block: Block, shape: Tensor) -> Tensor:
        return over_rows(self.row[block.index] * self.scale, len(self.spec.local_shape)) * shape
