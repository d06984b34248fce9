"""SM3: one accumulator per slice of each dimension."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.decay import ScaledState, scale_tensor
from lightning_sketch.codecs.keep import Keep
from lightning_sketch.codecs.shared import Sharing
from lightning_sketch.codecs.state import CodecState, Count, Entry, Number, StateSpec, Tensors, add_scaled, key_of
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import KernelState
from lightning_sketch.sharding import Block, Cut, Shard


@dataclass(frozen=True)
class SM3(Codec):
    r"""Square-root of Minima of Sums of Maxima: a vector per tensor dimension.

    A tensor ``[n_1, ..., n_p]`` keeps :math:`\sum_k n_k` numbers; a vector or a scalar is stored exactly. With
    accumulators :math:`\mu(r)` and covers :math:`r \ni i`, the slices through element i:

    - variant II (Algorithm SM3-II): :math:`\nu(i) = \min_{r \ni i} \mu(r) + g(i)^2`, then
      :math:`\mu(r) = \max_{i \in r} \nu(i)`;
    - variant I: :math:`\mu(r) \mathrel{+}= \max_{i \in r} g(i)^2`, then :math:`\nu(i) = \min_{r \ni i} \mu(r)`.

    Both hold :math:`\nu \ge \sum g^2`. As the ``exp_avg_sq`` of Adam or the ``square_avg`` of RMSprop the sum becomes
    an EMA, :math:`\nu = \beta \min \mu + (1 - \beta) g^2`, and :math:`\mu` is assigned the maximum, so that it decays.
    Absent rows of a sparse gradient keep their accumulator (Adagrad) or decay in constant time (EMA).

    Where ranks divide the parameter, the accumulators are those of one process: before a step, that of a slice which
    lies on several ranks becomes the largest of theirs.

    SM3's published recipe is its own: quadratic warm-up over about 5 % of the steps, then a constant learning rate.

    Args:
        variant: "II" (tighter, the one the paper recommends) or "I".
        momentum: if not 0, the update is an EMA of the *preconditioned* gradient with this factor, as in the paper; its
            buffer is dense, in the parameter's dtype. The layer's own first moment must then be `Drop` or absent.

    Raises:
        ValueError: an option is out of range.

    References:
        Anil et al., *Memory-Efficient Adaptive Optimization*, NeurIPS 2019, https://arxiv.org/abs/1901.11150
    """

    accelerator_blocks: ClassVar[int] = 12
    live_blocks: ClassVar[int] = 9

    variant: Literal["I", "II"] = "II"
    momentum: float = 0.0

    refuses_signed: ClassVar[str | None] = (
        "a minimum of maxima holds non-negative values only; choose Drop, Quantized, BFloat16 or Keep"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("I", "II"):
            raise ValueError(f"SM3(variant={self.variant!r}): must be 'I' or 'II'")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"SM3(momentum={self.momentum}): must be in [0, 1)")

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        shape = spec.local_shape
        tensors: dict[str, Any] = {f"dim{d}": spec.zeros(n) for d, n in enumerate(shape)}
        if self.momentum:
            tensors["momentum"] = torch.zeros(shape, dtype=spec.param_dtype, device=spec.device)
        return tensors | {"scale": scale_tensor()}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        vectors: dict[str, tuple[int | None, ...]] = {f"dim{d}": (d,) for d in range(ndim)}
        return vectors | ({"momentum": tuple(range(ndim))} if self.momentum else {})

    def sharing(self, shape: tuple[int, ...], cut: Cut) -> Sharing | None:
        # Under column shards dimension 1 is divided with the columns.
        whole = sum(shape[2:] if cut == "columns" else shape[1:])
        return Sharing(cut != "rows", whole, largest=True) if whole or cut != "rows" else None

    def to_whole(self, shard: Shard, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        if shard.is_cut_row:
            covers = covers_of_cut_row(shard, tensors["dim1"])
            tensors = {"dim0": tensors["dim0"]} | {f"dim{d}": cover for d, cover in enumerate(covers, start=1)}
        for suffix, value in tensors.items():
            held = whole[suffix][self._place(suffix, shard)]
            held.copy_(torch.maximum(held, value.to(held)))

    def _place(self, suffix: str, shard: Shard) -> tuple[slice, ...]:
        return () if suffix != "dim0" and shard.is_cut_row else super()._place(suffix, shard)

    def from_whole(self, shard: Shard, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().from_whole(shard, whole)
        if not shard.is_cut_row:
            return found
        covers = [found[f"dim{d}"] for d in range(1, len(shard.global_shape))]
        return {"dim0": found["dim0"], "dim1": bound_of_cut_row(shard, covers)}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return (_SM3I if self.variant == "I" else _SM3II)(spec, tensors)

    def bind_momentum(self, spec: StateSpec, tensors: Tensors) -> CodecState | None:
        """The EMA of the preconditioned gradient, if this codec has one."""
        if not self.momentum:
            return None
        return Keep().bind(_momentum_spec(spec), tensors)


class _SM3(ScaledState):
    """Accumulators: dimension 0 divided by the scale, so that absent rows decay in constant time; others as is."""

    row = Entry("dim0")
    divided = ("row",)
    observes: ClassVar[bool] = False
    column_decay: Number  # what the other accumulators have yet to decay by

    def __init__(self, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(spec, tensors)
        self._others = [key_of(spec.name, f"dim{d}") for d in range(1, len(spec.local_shape))]

    @property
    def others(self) -> list[Tensor]:
        """Accumulators of all dimensions but the first."""
        return [self.tensors[key] for key in self._others]

    def offer(self) -> None:
        """After a step accumulators are this rank's largest; those of all ranks are asked for before the next."""
        if (shared := self.shared) is None:
            return
        if shared.rows is not None:
            shared.rows.copy_(self.row * self._scale.item())
        if shared.whole is not None:
            for whole, here in zip(self._covers(shared.whole), self._to_covers(self.others), strict=True):
                torch.maximum(whole, here, out=whole)

    def _take_shared(self) -> None:
        shared, self.shared = self.shared, None
        if shared is None:
            return
        if shared.rows is not None:
            self.row.copy_(shared.rows / self._scale.item())
        if shared.whole is not None:
            for accumulator, found in zip(self._not_cut(self.others), self._from_covers(shared.whole), strict=True):
                # Without rows there is no step here that would replace it.
                accumulator.copy_(found) if self.spec.shard.local_rows else accumulator.zero_()

    def _covers(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The accumulators in the shared numbers of the layer, by dimension."""
        shape = self.spec.shard.global_shape
        return torch.split(whole, list(shape[2:] if self.spec.shard.cut == "columns" else shape[1:]))

    def _not_cut(self, accumulators: Sequence[Tensor]) -> Sequence[Tensor]:
        return accumulators[1:] if self.spec.shard.cut == "columns" else accumulators

    def _to_covers(self, accumulators: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the shared accumulators must at least be for these of the shard."""
        shard = self.spec.shard
        return covers_of_cut_row(shard, accumulators[0]) if shard.is_cut_row else self._not_cut(accumulators)

    def _from_covers(self, whole: Tensor) -> Sequence[Tensor]:
        """The shard's accumulators, but one that is cut, for these of the layer."""
        shard, covers = self.spec.shard, self._covers(whole)
        return [bound_of_cut_row(shard, covers)] if shard.is_cut_row else covers

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.weight = weight
        self._take_shared()
        self.decay_scale(decay)
        self.column_decay = decay
        self.all_rows = rows is None or rows.numel() == self.spec.shard.local_rows
        if rows is not None and rows.numel() == 0:  # kernels do nothing for such a layer
            self.settle_columns()

    def settle_columns(self) -> None:
        """Let the accumulators of all dimensions but the first decay, which kernels do themselves."""
        if isinstance(self.column_decay, Tensor) or self.column_decay != 1:
            for accumulator in self.others:
                accumulator.mul_(self.column_decay)
        self.column_decay = 1.0

    def estimate(self, block: Block) -> Tensor:
        ndim = len(self.spec.local_shape)
        least = _along(self.row[block.index] * self.scale, 0, ndim)
        for d, accumulator in enumerate(self.others, start=1):
            least = torch.minimum(least, _along(accumulator, d, ndim))
        return least


class _SM3II(_SM3):
    # The step's `nu` needs the accumulators of before the step, so those that blocks share are replaced in `commit`; a
    # row belongs to one block, and to hold all new ones back would be a temporary that grows with the table.
    adds_values: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True
    can_follow: ClassVar[bool] = True

    def settle(self) -> None:
        self.settle_columns()
        # With every row present the maximum is assigned (so it can fall); absent rows are bounded by the old value.
        self.new_others = [torch.zeros_like(a) if self.all_rows else a.clone() for a in self.others]
        self.left_out: Tensor | None = None  # whether a row was left out, 0-d

    def fusable(self) -> bool:
        shard, others = self.spec.shard, self.others
        columns = not others or (len(others) == 1 and self.plain(others[0], shard.row_numel))
        return columns and self.plain(self.row, shard.local_rows)

    def to_kernel(self) -> KernelState:
        columns = self.others[0] if self.others else None
        return KernelState(Kind.SM3, self.row, columns, 1.0, self.weight, self.column_decay, self.scale)

    def read(self, block: Block, x: Tensor) -> Tensor:
        nu = self.estimate(block) + x * self.weight  # [k, *row_shape]
        row = _max_to(nu, 0) / self.scale
        if (good := block.good) is None:
            self.row[block.index], present = row, nu
        else:
            self.row[block.index] = row.where(good.flatten(), self.row[block.index])
            present = nu.where(good, 0.0)
            left_out = good.all().logical_not()
            self.left_out = left_out if self.left_out is None else self.left_out | left_out
        self.new_others = [torch.maximum(new, _max_to(present, d)) for d, new in enumerate(self.new_others, start=1)]
        return nu

    def commit(self) -> None:
        for accumulator, new in zip(self.others, self.new_others, strict=True):
            if self.left_out is not None:  # as with absent rows
                new = torch.maximum(new, accumulator.where(self.left_out, 0.0))
            accumulator.copy_(new)
        del self.new_others, self.left_out  # a bound state outlives the step


class _SM3I(_SM3):
    observes: ClassVar[bool] = True

    def offer(self) -> None:
        """Nothing: what is shared is the largest of the gradient."""

    def observe(self, block: Block, x: Tensor) -> None:
        if (shared := self.shared) is None:
            return
        if shared.rows is not None:
            shared.rows[block.index] = _max_to(x, 0)
        if shared.whole is not None:
            here = [_max_to(x, dim) for dim in range(1, x.ndim)]
            for whole, largest in zip(self._covers(shared.whole), self._to_covers(here), strict=True):
                torch.maximum(whole, largest, out=whole)

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        shared, self.shared = self.shared, None
        super().begin(decay=decay, weight=weight, step=step, rows=rows)
        self.settle_columns()
        self.adds_rows, self.added = True, self.others  # what `add` has yet to look for
        if shared is not None and shared.rows is not None:
            add_scaled(self.row, shared.rows, weight / self.scale)
            self.adds_rows = False
        if shared is not None and shared.whole is not None:
            for accumulator, found in zip(self._not_cut(self.others), self._from_covers(shared.whole), strict=True):
                add_scaled(accumulator, found, weight)
            self.added = self.others[:1] if self.spec.shard.cut == "columns" else []
        self.most = [torch.zeros_like(a) for a in self.added]

    def add(self, block: Block, x: Tensor) -> None:
        if self.adds_rows:
            self.row[block.index] += _max_to(x, 0) * (self.weight / self.scale)
        self.most = [torch.maximum(most, _max_to(x, d)) for d, most in enumerate(self.most, start=1)]

    def settle(self) -> None:
        for accumulator, most in zip(self.added, self.most, strict=True):
            add_scaled(accumulator, most, self.weight)
        del self.most, self.added

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.estimate(block)


def covers_of_cut_row(shard: Shard, columns: Tensor) -> list[Tensor]:
    """What accumulators of the dimensions but the first must at least be for a part of a row, ``[row_numel]``."""
    row = columns.new_zeros(1, shard.whole_row_numel)
    row[:, shard.column_offset : shard.column_offset + shard.row_numel] = columns
    row = row.view(1, *shard.global_shape[1:])
    return [_max_to(row, dim) for dim in range(1, row.ndim)]


def bound_of_cut_row(shard: Shard, covers: Sequence[Tensor]) -> Tensor:
    """The bound that accumulators of the dimensions but the first are to a part of a row, ``[row_numel]``."""
    along = [_along(cover, dim, len(covers)) for dim, cover in enumerate(covers)]
    least = functools.reduce(torch.minimum, along).expand(shard.global_shape[1:]).flatten()
    return least[shard.column_offset : shard.column_offset + shard.row_numel]


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """View a vector along dimension `dim` of `ndim`."""
    return vector.view([-1 if d == dim else 1 for d in range(ndim)])


def _max_to(x: Tensor, dim: int) -> Tensor:
    """Maximum over all dimensions but `dim`: ``[x.shape[dim]]``."""
    others = [d for d in range(x.ndim) if d != dim]
    return x.amax(dim=others) if others else x


def _momentum_spec(spec: StateSpec) -> StateSpec:
    return replace(spec, name=f"{spec.name}_momentum", signed=True, fill=0.0)
