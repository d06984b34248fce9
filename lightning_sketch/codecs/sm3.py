"""SM3: one accumulator per slice of each dimension."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec, CodecState, Count, Entry, Number, StateSpec, Tensors, add_scaled, key_of
from lightning_sketch.codecs.decay import ScaledState, scale_tensor
from lightning_sketch.codecs.keep import Keep
from lightning_sketch.kernels.schema import KernelState, Kind
from lightning_sketch.sharding import Block


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
        "a minimum of maxima holds non-negative values only; choose Drop, BFloat16, CountSketch or Keep"
    )

    def __post_init__(self) -> None:
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

    def __init__(self, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(spec, tensors)
        self._others = [key_of(spec.name, f"dim{d}") for d in range(1, len(spec.local_shape))]

    @property
    def others(self) -> list[Tensor]:
        """Accumulators of all dimensions but the first."""
        return [self.tensors[key] for key in self._others]

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.weight = weight
        self.decay_scale(decay)
        self.column_decay: Number = 1.0
        if self.deferred or (self.fused and self.row.device.type != "cpu"):  # of all layers in one launch
            self.column_decay = decay
        elif isinstance(decay, Tensor) or decay != 1:
            for accumulator in self.others:
                accumulator.mul_(decay)
        self.all_rows = rows is None or rows.numel() == self.spec.shard.local_rows

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

    def settle(self) -> None:
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
    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        super().begin(decay=decay, weight=weight, step=step, rows=rows)
        self.most = [torch.zeros_like(a) for a in self.others]

    def add(self, block: Block, x: Tensor) -> None:
        self.row[block.index] += _max_to(x, 0) * (self.weight / self.scale)
        self.most = [torch.maximum(most, _max_to(x, d)) for d, most in enumerate(self.most, start=1)]

    def settle(self) -> None:
        for accumulator, most in zip(self.others, self.most, strict=True):
            add_scaled(accumulator, most, self.weight)
        del self.most

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.estimate(block)


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """View a vector along dimension `dim` of `ndim`."""
    return vector.view([-1 if d == dim else 1 for d in range(ndim)])


def _max_to(x: Tensor, dim: int) -> Tensor:
    """Maximum over all dimensions but `dim`: ``[x.shape[dim]]``."""
    others = [d for d in range(x.ndim) if d != dim]
    return x.amax(dim=others) if others else x


def _momentum_spec(spec: StateSpec) -> StateSpec:
    return replace(spec, name=f"{spec.name}_momentum", signed=True, fill=0.0)
