"""Count-sketch and count-min sketch of whole rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.decay import ScaledState, scale_tensor
from lightning_sketch.codecs.shared import Shared, Sharing
from lightning_sketch.codecs.state import CodecState, Count, Entry, Number, StateSpec, Tensors, add_scaled
from lightning_sketch.kernels.bags import Bags, bag_sums, is_batched, sort_into_bags
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.reference import gather_median, gather_min, hash_rows, over_rows, segment_add
from lightning_sketch.kernels.schema import MOST_DEPTH, KernelState
from lightning_sketch.sharding import Block, Cut, Shard


@dataclass(frozen=True)
class CountSketch(Codec):
    r"""Hash whole rows into a table ``[depth, width, *row_shape]``.

    Signed states (first moments) are a count-sketch: random signs, the estimate is the median over `depth`, unbiased.
    Non-negative states (second moments) are a count-min sketch: no signs, the minimum over `depth`, which never
    underestimates. Rows that collide share their bucket.

    ``update="linear"`` keeps the sketch of the dense state exactly: with :math:`S` the sketch operator,
    :math:`T \leftarrow \beta T + (1-\beta) S(x)`. Rows that are absent from a sparse gradient decay too, as they would
    under dense gradients, in constant time: the table is stored divided by one scalar. ``update="paper"`` is the rule
    of the paper's Algorithms 2 to 4: query, then add :math:`\Delta = (1-\beta)(x - \hat{s})` to every depth. It decays
    touched rows only, and its buckets drift; it is here for reproduction. Rows go in order, in blocks that query before
    they add.

    A table at least as wide as the parameter has rows stores every row exactly, at depth 1, without hashing.

    Args:
        compression: how many times smaller than the dense float32 state; ignored when `width` is given.
        depth: number of hash functions.
        width: buckets per hash function; default ``ceil(rows / (compression * depth))``.
        update: "linear" or "paper".
        lazy: with "linear", decay only the buckets that a touched row falls into, and under dense gradients treat
            all-zero rows as absent (the semantics of ``torch.optim.SparseAdam`` for rows that do not collide).
        cleaning_interval: multiply the table by `cleaning_factor` every so many steps; 0 for never (paper, section 4).
        cleaning_factor: in (0, 1].
        sync: where ranks divide the rows, keep one sketch of all of them on every rank, and add up in every step what
            the ranks add to it: the sketch of one process, at its size on each rank and as many bytes of traffic a
            step. Without it every rank sketches its own rows.

    Raises:
        ValueError: an option is out of range.

    References:
        Spring et al., *Compressing Gradient Optimizers via Count-Sketches*, ICML 2019, https://arxiv.org/abs/1902.00179
    """

    compression: float = 20.0
    depth: int = 3
    width: int | None = None
    update: Literal["linear", "paper"] = "linear"
    lazy: bool = False
    cleaning_interval: int = 0
    cleaning_factor: float = 1.0
    sync: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.compression < math.inf:
            raise ValueError(f"CountSketch(compression={self.compression}): must be >= 1 and finite")
        if self.depth < 1:
            raise ValueError(f"CountSketch(depth={self.depth}): must be >= 1")
        if self.width is not None and not (type(self.width) is int and 1 <= self.width < 1 << 31):
            raise ValueError(f"CountSketch(width={self.width}): must be in [1, 2**31)")
        if self.update not in ("linear", "paper"):
            raise ValueError(f"CountSketch(update={self.update!r}): must be 'linear' or 'paper'")
        if self.lazy and self.update == "paper":
            raise ValueError("CountSketch(update='paper') decays touched rows only by itself; leave lazy=False")
        if self.sync and self.update == "paper":
            raise ValueError(
                "CountSketch(update='paper') queries before it adds, so ranks cannot add up; leave sync=False"
            )
        if self.cleaning_interval < 0:
            raise ValueError(f"CountSketch(cleaning_interval={self.cleaning_interval}): must be >= 0")
        if not 0 < self.cleaning_factor <= 1:
            raise ValueError(f"CountSketch(cleaning_factor={self.cleaning_factor}): must be in (0, 1]")

    joins_columns: ClassVar[bool] = True
    accelerator_blocks: ClassVar[int] = 7

    def table_shape(self, shard: Shard) -> tuple[int, int]:
        """``(depth, width)`` of the table for the rows of `shard`, which gets its share of an explicit `width`.

        A table that ranks share is for all rows.
        """
        if self._is_shared(shard.cut):
            depth, width = self._table_shape(shard, shard.global_rows)
            if width < shard.global_rows:
                return depth, width
        return self._table_shape(shard, shard.table_rows)

    def _is_shared(self, cut: Cut | None) -> bool:
        # One that is cut by columns has all rows already.
        return self.sync and cut in ("rows", "anywhere")

    def shares_buckets(self, shard: Shard) -> bool:
        rows = shard.global_rows if self._is_shared(shard.cut) else shard.table_rows
        return self._table_shape(shard, rows)[1] < rows

    def sharing(self, shape: tuple[int, ...], cut: Cut) -> Sharing | None:
        whole = Shard.whole(shape)
        if not (self._is_shared(cut) and self.shares_buckets(whole)):
            return None
        return Sharing(False, math.prod(self.table_shape(whole)) * whole.row_numel, lazy=self.lazy)

    def _table_shape(self, shard: Shard, rows: int) -> tuple[int, int]:
        if self.width is None:
            width = math.ceil(rows / (self.compression * self.depth))
        else:
            width = math.ceil(self.width * rows / max(1, shard.global_rows))
        if width >= 1 << 31:
            raise ValueError(f"CountSketch: {rows} rows at compression {self.compression} need a width below 2**31")
        return (1, rows) if width >= rows else (self.depth, width)

    @property
    def decays_absent_rows(self) -> bool:
        return super().decays_absent_rows and self.update != "paper"

    def wider(self, shard: Shard) -> CountSketch | None:
        if not self.shares_buckets(shard):
            return None
        rows = shard.global_rows if self._is_shared(shard.cut) else shard.table_rows
        depth, width = self.table_shape(shard)
        if 2 * width * depth >= rows:
            return replace(self, width=shard.global_rows)  # of a shard its share: a bucket for each row
        return replace(self, width=None, compression=_compression(rows, depth, 2 * width))

    @property
    def needs_host(self) -> str | None:
        return "counts steps (cleaning_interval)" if self.cleaning_interval else super().needs_host

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        table = spec.zeros(*self.table_shape(spec.shard), *spec.shard.row_shape)
        return {"table": table, "scale": scale_tensor()}

    def to_whole(self, shard: Shard, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        found = tensors["table"]
        _columns_of(whole["table"], shard).copy_(found.reshape(*found.shape[:2], -1))

    def from_whole(self, shard: Shard, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        table = _columns_of(whole["table"], shard)
        return {"table": table.reshape(*table.shape[:2], *shard.row_shape)}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"table": (None, None, *range(1, ndim))}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return (_PaperSketch if self.update == "paper" else LinearSketch)(self, spec, tensors)


def _compression(rows: int, depth: int, width: int) -> float:
    """The shortest number at which a table of `depth` for `rows` is of that width."""
    middle = rows / ((width - 0.5) * depth)  # half a bucket less is rounded up, whatever the last bit of a quotient is
    found = (float(f"{middle:.{digits}g}") for digits in range(2, 18))
    return next(x for x in found if math.ceil(rows / (x * depth)) == width)


def _columns_of(table: Tensor, shard: Shard) -> Tensor:
    """The part of a table of whole rows that a shard has, ``[depth, width, row_numel]``."""
    return table.view(*table.shape[:2], -1)[..., shard.column_offset : shard.column_offset + shard.row_numel]


class _Sketch(ScaledState):
    table = Entry("table")  # [depth, width, *row_shape], the true sketch divided by the scale
    divided = ("table",)
    can_follow: ClassVar[bool] = True

    def __init__(self, codec: CountSketch, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(spec, tensors)
        self.codec = codec
        self.depth, self.width = int(self.table.shape[0]), int(self.table.shape[1])
        self.exact: bool = not codec.shares_buckets(spec.shard)

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.decay, self.weight = decay, weight
        if self.codec.cleaning_interval and step % self.codec.cleaning_interval == 0:  # which `needs_host` says
            self.table.mul_(self.codec.cleaning_factor)

    def insert(self, block: Block, x: Tensor, weight: Number) -> None:
        if self.exact and isinstance(block.index, slice):
            add_scaled(self.table[0, block.index], x, weight)
            return
        if self._in_bags(block, x):
            shape, cut_into = (self.depth, self.width), block.whole.cut_into  # type: ignore[union-attr]
            sums = bag_sums(x, self._bags(block, x.dtype), shape, block.span, cut_into, signed=self.spec.signed)
            add_scaled(self.table, sums, weight)
            return
        buckets, signs = self.hashes(block)
        x = x * weight  # once; index_add_ is three times slower with an alpha
        if is_batched(x) or (x.ndim == 1 and x.device.type != "cpu"):  # small: all levels in one call
            levels = torch.arange(self.depth, device=x.device).unsqueeze(1)
            each = x.expand(self.depth, *x.shape)
            if self.spec.signed and not self.exact:
                each = each * signs.view(*signs.shape, *[1] * (x.ndim - 1))
            segment_add(self.table.flatten(0, 1), (buckets + levels * self.width).flatten(), each.flatten(0, 1))
            return
        for level in range(self.depth):
            signed = x * over_rows(signs[level], x.ndim) if self.spec.signed and not self.exact else x
            segment_add(self.table[level], buckets[level], signed)

    def _in_bags(self, block: Block, x: Tensor) -> bool:
        """Whether rows are added by `bag_sums`: on CUDA devices, in blocks of a gradient that share one order."""
        return x.device.type == "cuda" and block.whole is not None and not self.exact and not is_batched(x)

    def _bags(self, block: Block, dtype: torch.dtype) -> Bags:
        whole = block.whole
        assert whole is not None

        def make() -> Bags:
            return sort_into_bags(*self.hashes(whole), self.width, whole.cut_into, dtype)

        return whole.memo(("bags", self.depth, self.width, dtype), make)

    def estimate(self, block: Block) -> Tensor:
        if self.exact and isinstance(block.index, slice):
            return self.table[0, block.index] * self.scale
        buckets, signs = self.hashes(block)
        if self.spec.signed and not self.exact:
            found = gather_median(self.table, buckets, signs)
        else:
            found = gather_min(self.table, buckets)
        return found.mul_(self.scale)

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.estimate(block)

    def hashes(self, block: Block) -> tuple[Tensor, Tensor]:
        """Buckets and signs of the block's rows, int64 and int8 ``[depth, k]``."""
        if self.exact:
            rows = block.local_ids(self.table.device)[None]
            return rows, rows

        def make(row_ids: Tensor) -> tuple[Tensor, ...]:
            return hash_rows(row_ids, self.spec.seed, self.depth, self.width)

        buckets, signs = block.of_rows((self.depth, self.width), self.table.device, make)
        return buckets, signs


class LinearSketch(_Sketch):
    """A sketch of the dense state, bound."""

    def __init__(self, codec: CountSketch, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(codec, spec, tensors)
        self.elementwise = self.exact
        self.bounded = spec.signed and not self.exact

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        super().begin(decay=decay, weight=weight, step=step, rows=rows)
        shared, self.shared = self.shared, None
        self.observed = shared is not None and shared.whole is not None
        if self.codec.lazy and rows is not None:
            self.decay_scale(1.0)
            if shared is None or (self.exact and shared.rows is None):
                self._decay_touched(rows)
            else:
                self._decay_shared(shared)
        else:
            self.decay_scale(decay)
        if shared is not None and shared.whole is not None:
            add_scaled(self.table, self._own_columns(shared.whole), weight / self.scale)

    def observe(self, block: Block, x: Tensor) -> None:
        if (shared := self.shared) is None or shared.whole is None:
            return
        buckets, signs = self.hashes(block)
        own = self._own_columns(shared.whole)
        for level in range(self.depth):
            signed = x * over_rows(signs[level], x.ndim) if self.spec.signed else x
            segment_add(own[level], buckets[level], signed)
        if shared.touched is not None:
            ones = torch.ones_like(x)
            for level in range(self.depth):
                segment_add(self._own_columns(shared.touched)[level], buckets[level], ones)

    def _own_columns(self, whole: Tensor) -> Tensor:
        """The part of a table of the whole layer that is laid out as this one, ``[depth, width, *row_shape]``."""
        shard = self.spec.shard
        own = whole.view(self.depth, self.width, shard.whole_row_numel)
        return own.narrow(2, shard.column_offset, shard.row_numel).view(self.table.shape)

    def fusable(self) -> bool:
        # Kernels would insert what `begin` has folded in, where ranks agree on it.
        shard = self.spec.shard
        return self.is_plain() and (shard.cut is None or self.codec.sharing(shard.global_shape, shard.cut) is None)

    def is_plain(self) -> bool:
        """Whether kernels may read the table."""
        numel = self.depth * self.width * self.spec.shard.row_numel
        return self.depth <= MOST_DEPTH and self.plain(self.table, numel)

    def to_kernel(self) -> KernelState:
        scale = self.scale
        weight = self.weight / scale
        if self.exact:
            return KernelState(Kind.SCALED, self.table[0], weight=weight, scale=scale)
        return KernelState(
            Kind.SKETCH,
            self.table,
            weight=weight,
            scale=scale,
            is_signed=self.spec.signed,
            depth=self.depth,
            width=self.width,
            seed=self.spec.seed,
        )

    def _decay_touched(self, rows: Tensor) -> None:
        # Each touched bucket once, however many touched rows fall into it.
        buckets, _ = self.hashes(Block(self.spec.shard, rows, slice(0, rows.numel())))
        for level in range(self.depth):
            touched = torch.unique(buckets[level])
            self.table[level].index_copy_(0, touched, self.table[level].index_select(0, touched).mul_(self.decay))

    def _decay_shared(self, shared: Shared) -> None:
        # Each bucket once into which a row falls that any rank touches.
        counts = torch.zeros_like(self.table)
        if shared.touched is not None:
            counts += self._own_columns(shared.touched)
        if self.exact and shared.touched_rows is not None:
            counts[0] = shared.touched_rows
        elif shared.all_touched is not None:
            ids = shared.ids
            if ids is None:
                ids = torch.arange(shared.all_touched.numel(), device=counts.device)
            buckets, _ = hash_rows(ids, self.spec.seed, self.depth, self.width)
            for level in range(self.depth):
                segment_add(counts[level], buckets[level], shared.all_touched)
        self.table.mul_(torch.where(counts > 0, self.decay, 1.0))

    def add(self, block: Block, x: Tensor) -> None:
        if not self.observed:
            self.insert(block, x, self.weight / self.scale)


class _PaperSketch(_Sketch):
    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        super().begin(decay=decay, weight=weight, step=step, rows=rows)
        self.decay_scale(1.0)  # rows decay as they are added

    def add(self, block: Block, x: Tensor) -> None:
        delta = x * self.weight
        if isinstance(self.decay, Tensor) or self.decay != 1:
            add_scaled(delta, self.estimate(block), self.decay - 1)
        if block.good is not None:
            delta = delta.where(block.good, 0.0)
        self.insert(block, delta, 1.0)

    def estimate(self, block: Block) -> Tensor:
        found = super().estimate(block)
        # Adding one row's negative delta to a bucket that it shares can take the bucket below zero.
        return found if self.spec.signed else found.clamp_min_(0)
