"""States in bfloat16 with stochastic rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.keep import DenseState
from lightning_sketch.codecs.rounding import noise_seed, rounding_noise
from lightning_sketch.codecs.state import CodecState, Count, Number, StateSpec, Tensors
from lightning_sketch.kernels.bags import is_batched
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import KernelState
from lightning_sketch.sharding import Block


@dataclass(frozen=True)
class BFloat16(Codec):
    """Store the state in bfloat16: 2 bytes per parameter.

    bfloat16 has 8 bits of mantissa, and one step of an EMA with beta2 = 0.999 changes a state by a thousandth: rounded
    to nearest, most steps would change nothing. Stochastic rounding keeps the expectation exact. Its random bits are a
    hash of (layer seed, step, global row, column), so replicas agree bit for bit and a resumed run needs no generator
    state.

    Args:
        stochastic: round stochastically (default), or to nearest.
    """

    stochastic: bool = True

    elementwise: ClassVar[bool] = True
    accelerator_blocks: ClassVar[int] = 6
    live_blocks: ClassVar[int] = 9

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        return {"": spec.zeros(*spec.local_shape, dtype=torch.bfloat16)}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"": tuple(range(ndim))}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return _BFloat16State(spec, tensors) if self.stochastic else DenseState(spec, tensors)


class _BFloat16State(DenseState):
    seed: Any  # of the step's noise

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        super().begin(decay=decay, weight=weight, step=step, rows=rows)
        self.seed = noise_seed(self.spec, step)

    def fusable(self) -> bool:
        return self.dense.dtype == torch.bfloat16 and super().fusable()

    def to_kernel(self) -> KernelState:
        stored = KernelState(Kind.STOCHASTIC, self.dense, None, self.decay, self.weight)
        stored.seed = self.seed
        return stored

    def store(self, block: Block, values: Tensor) -> Tensor:
        noise = rounding_noise(self.spec, self.seed, block, values.device)
        return stochastic_round(values.float(), noise.view(values.shape))


def stochastic_round(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with probability equal to the fraction cut off.

    Args:
        values: float32.
        noise: int32 of the same shape, uniform in ``[0, 2**16)``.
    """
    if is_batched(values):
        rounded: Tensor = _UnderVmap.apply(values, noise)  # type: ignore[no-untyped-call]
        return rounded
    return _round(values, noise)


def _round(values: Tensor, noise: Tensor) -> Tensor:
    # bfloat16 is the upper half of float32: add noise below the cut, then cut.
    bits = values.contiguous().view(torch.int32).add(noise)
    rounded = bits.bitwise_and_(-(1 << 16)).view(torch.float32)
    # Infinity stays so by itself; a NaN of all ones would become -0.
    return torch.where(values == values, rounded, values).to(torch.bfloat16)


class _UnderVmap(torch.autograd.Function):
    """`_round` for all layers at once: before torch 2.13 ``torch.vmap`` has no rule for ``view`` as another dtype."""

    @staticmethod
    def forward(values: Tensor, noise: Tensor) -> Tensor:
        return _round(values, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], values: Tensor, noise: Tensor) -> tuple[Tensor, int]:
        batched = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((values, noise), in_dims, strict=True)
        ]
        return _round(*batched), 0
