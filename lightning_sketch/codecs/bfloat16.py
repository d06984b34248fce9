"""States in bfloat16 with stochastic rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec, CodecState, StateSpec, Tensors
from lightning_sketch.codecs.keep import DenseState
from lightning_sketch.kernels.fused import Kind, Stored
from lightning_sketch.kernels.reference import mix64
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

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        return {"": spec.zeros(*spec.local_shape, dtype=torch.bfloat16)}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"": tuple(range(ndim))}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return _BFloat16State(spec, tensors) if self.stochastic else DenseState(spec, tensors)


class _BFloat16State(DenseState):
    @property
    def salt(self) -> int:
        """Seed of this step's noise."""
        # signed and unsigned states of a layer share the seed, so tell them apart: else m and v round alike
        return self.spec.seed + self.step * 2 + self.spec.signed

    def fusable(self) -> bool:
        return self.dense.dtype == torch.bfloat16 and super().fusable()

    def stored(self) -> Stored:
        stored = Stored(Kind.STOCHASTIC, self.dense, None, self.decay, self.weight)
        stored.seed = self.salt
        return stored

    def store(self, block: Block, values: Tensor) -> Tensor:
        salt = self.salt
        device = values.device
        (rows,) = block.of_rows(("noise", salt), device, lambda ids: (mix64(ids, salt).to(torch.int32),))  # [k]
        if block.whole is None:
            columns = self._column_bits(device)
        else:
            columns = block.whole.memo(("columns", salt), lambda: self._column_bits(device))
        noise = _noise16(rows[:, None] ^ columns[None, :]).view(values.shape)
        return stochastic_round(values.float(), noise)

    def _column_bits(self, device: torch.device) -> Tensor:
        places = torch.arange(self.spec.shard.row_numel, device=device) + self.spec.shard.column_offset
        return mix64(places, ~self.salt).to(torch.int32)


def stochastic_round(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with probability equal to the fraction cut off.

    Args:
        values: float32.
        noise: int32 of the same shape, uniform in ``[0, 2**16)``.
    """
    # bfloat16 is the upper half of float32: add noise below the cut, then cut.
    bits = values.contiguous().view(torch.int32).add(noise)
    rounded = bits.bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _noise16(x: Tensor) -> Tensor:
    """Mix int32 bits (multiplicative hashing, wrapping) and return 16 uniform bits as int32 in [0, 2**16)."""
    x = x * -1640531527  # 2**32 / golden ratio, odd
    x = (x ^ (x >> 15)) * -2048144789  # murmur3's first finaliser constant
    return (x >> 16) & 0xFFFF
