"""Row means and column means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.decay import ScaledState, scale_tensor
from lightning_sketch.codecs.shared import Shared, Sharing
from lightning_sketch.codecs.state import CodecState, Count, Entry, Number, StateSpec, Tensors, add_scaled
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.reference import over_rows, row_mean
from lightning_sketch.kernels.schema import KernelState
from lightning_sketch.sharding import Block, Cut, Shard

MOST_FLOOR = 1e6  # far more holds everything, and times a large mean it would overflow


@dataclass(frozen=True)
class Factored(Codec):
    r"""A rank-1 second moment :math:`\hat v_{ij} = r_i c_j / \bar c` of row means :math:`r`, column means :math:`c`.

    Dimension 0 is the rows; all others together are the columns, so a tensor ``[n, a, b]`` keeps ``n + a b`` numbers.
    Row and column means are linear in the dense state, so absent rows of a sparse gradient decay exactly as under dense
    gradients, in constant time. Where ranks divide the parameter, they are those of one process: a row that lies on
    several ranks has one mean, and column means are over all rows.

    A row whose mean of squares is 2**90 (1.2e27) or more is left out of a step as if it were not finite: sums over all
    rows must not overflow.

    With a `floor` :math:`\varphi` steps are made by :math:`(r_i + \varphi \bar r) c_j / \bar c`: the mean of all rows
    is added to each as often as that, so that no row's steps are much longer than those of a row like the mean. It is
    what a larger eps does, in units that follow the gradients; the means that are stored are without it.

    Args:
        floor: how many times the mean of all rows is added to each row's for a step, at least 0. For tables with rows
            that seldom have a gradient; in hidden layers, whose rows all have one, it only makes steps shorter.

    Raises:
        ValueError: an option is out of range.

    References:
        Shazeer and Stern, *Adafactor*, ICML 2018, https://arxiv.org/abs/1804.04235, Algorithm 2
    """

    floor: float = 0.0

    live_blocks: ClassVar[int] = 7
    refuses_signed: ClassVar[str | None] = (
        "a product of row and column means holds non-negative values only; choose Drop, Quantized, BFloat16 or Keep"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= MOST_FLOOR:
            raise ValueError(f"Factored(floor={self.floor}): must be in [0, {MOST_FLOOR:g}]")

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        shard = spec.shard
        # A row that is cut anywhere has the columns of all of it: their mean is wanted, too.
        columns = (shard.whole_row_numel,) if shard.is_cut_row else shard.row_shape
        return {"row": spec.zeros(shard.local_rows), "col": spec.zeros(*columns), "scale": scale_tensor()}

    def sharing(self, shape: tuple[int, ...], cut: Cut) -> Sharing:
        return Sharing(rows=cut != "rows", whole=0 if cut == "columns" else Shard.whole(shape).row_numel)

    def to_whole(self, shard: Shard, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        columns = tensors["col"].view(whole["col"].shape) if shard.is_cut_row else tensors["col"]
        super().to_whole(shard, {"row": tensors["row"], "col": columns}, whole)

    def _place(self, suffix: str, shard: Shard) -> tuple[slice, ...]:
        return () if suffix == "col" and shard.is_cut_row else super()._place(suffix, shard)

    def from_whole(self, shard: Shard, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().from_whole(shard, whole)
        return found | {"col": found["col"].flatten()} if shard.is_cut_row else found

    def fills_empty_rows(self, shard: Shard) -> bool:
        return self.floor > 0

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"row": (0,), "col": tuple(range(1, ndim))}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return _Factored(spec, tensors, self)


class _Factored(ScaledState):
    row = Entry("row")  # [local_rows], divided by the scale
    col = Entry("col")  # row_shape, divided by the scale
    divided = ("row", "col")
    can_follow: ClassVar[bool] = True
    takes_sums: ClassVar[bool] = True
    shares_squares: ClassVar[bool] = True

    def __init__(self, spec: StateSpec, tensors: Tensors, codec: Factored) -> None:
        super().__init__(spec, tensors)
        self.floor = codec.floor

    def share(self, shared: Shared) -> None:
        super().share(shared)
        # What is of this rank alone: means of its whole rows, or of its columns.
        self.own = torch.zeros_like(self.row if shared.rows is None else self.col)

    def forget_shared(self) -> None:
        super().forget_shared()
        del self.own

    def observe(self, block: Block, x: Tensor) -> None:
        if (shared := self.shared) is None:
            return
        self.observe_sums(block, row_mean(x), None if shared.whole is None else x.sum(dim=0).flatten())

    @property
    def wants_columns(self) -> bool:
        return self.shared is not None and self.shared.whole is not None

    def observe_sums(self, block: Block, means: Tensor, columns: Tensor | None) -> None:
        if (shared := self.shared) is None:
            return
        shard = self.spec.shard
        if shared.rows is None:
            self.own[block.index] = means.to(self.own.dtype)
        else:
            shared.rows[block.index] += means * (shard.row_numel / shard.whole_row_numel)
        if shared.whole is not None:
            assert columns is not None
            own = shared.whole[shard.column_offset : shard.column_offset + shard.row_numel]
            add_scaled(own, columns, 1.0 / max(1, shard.global_rows))

    @property
    def observes_agreed(self) -> bool:
        return self.spec.shard.cut == "columns"

    def observe_agreed(self, block: Block, x: Tensor) -> None:
        self.observe_agreed_sums(x.sum(dim=0))

    def observe_agreed_sums(self, columns: Tensor) -> None:
        add_scaled(self.own, columns.view(self.own.shape), 1.0 / max(1, self.spec.shard.global_rows))

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.weight = weight / self.decay_scale(decay)
        shared, self.shared = self.shared, None
        self.observed = shared is not None
        if shared is not None:
            add_scaled(self.row, self.own if shared.rows is None else shared.rows, self.weight)
            if shared.whole is not None:
                add_scaled(self.col, shared.whole.view(self.col.shape), self.weight)
            elif shared.rows is not None:
                add_scaled(self.col, self.own, self.weight)
            del self.own

    def add(self, block: Block, x: Tensor) -> None:
        if self.observed:
            return
        self.row[block.index] += row_mean(x) * self.weight
        columns = x.sum(dim=0)
        own = self._own_columns(self.col)
        add_scaled(own, columns.view(own.shape), self.weight / max(1, self.spec.shard.global_rows))

    def fusable(self) -> bool:
        shard = self.spec.shard
        return self.plain(self.row, shard.local_rows) and self.plain(self._own_columns(self.col), shard.row_numel)

    def to_kernel(self) -> KernelState:
        if self.observed:
            # Kernels divide columns by the mean of those that are here.
            columns = self._own_columns(self.col)
            row = self.row
            if self.spec.shard.part_shape is not None:
                row = row * (columns.mean() / self._mean()).nan_to_num_(nan=0.0)
            return KernelState(Kind.FACTORED, row, columns, 1.0, 0.0, 0.0, self.scale, floor=self.floor)
        column_weight = self.weight / max(1, self.spec.shard.global_rows)
        return KernelState(
            Kind.FACTORED, self.row, self.col, 1.0, self.weight, column_weight, self.scale, floor=self.floor
        )

    def settle(self) -> None:
        self.factors = self._factors(self.floor)

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self._product(block, *self.factors)

    def commit(self) -> None:
        del self.factors  # a bound state outlives the step

    def estimate(self, block: Block) -> Tensor:
        return self._product(block, *self._factors(floor=0.0))

    def as_read(self, estimate: Tensor) -> Tensor:
        return estimate + self._own_columns(self.col) * (self.floor * self.scale) if self.floor else estimate

    def _factors(self, floor: float) -> tuple[Tensor, Tensor | None]:
        """The columns over their mean, and what is added to every row."""
        mean = self._mean()
        # 0/0 := 0 before the first gradient
        shape = (self._own_columns(self.col) / mean).nan_to_num_(nan=0.0)
        return shape, mean * floor if floor else None

    def _mean(self) -> Tensor:
        """Mean of all columns of the layer; of all of its rows it is the same."""
        return self.row.mean() if self.spec.shard.cut == "columns" else self.col.mean()

    def _own_columns(self, columns: Tensor) -> Tensor:
        shard = self.spec.shard
        if not shard.is_cut_row:
            return columns
        return columns[shard.column_offset : shard.column_offset + shard.row_numel]

    def _product(self, block: Block, shape: Tensor, added: Tensor | None) -> Tensor:
        row = self.row[block.index]
        row = row if added is None else row + added
        return over_rows(row * self.scale, len(self.spec.local_shape)) * shape
