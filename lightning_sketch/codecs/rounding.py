"""The noise of stochastic rounding: a hash of where a number is and of when, so that every replica makes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs.state import Count, StateSpec
from lightning_sketch.kernels.reference import FACTOR, mix64, signed
from lightning_sketch.sharding import Block


def noise_seed(spec: StateSpec, step: Count) -> Any:
    """Seed of a state's noise in one step: an integer, or an int64 tensor where the step's number is one."""
    if isinstance(step, Tensor):
        return step.to(torch.int64) * 2 + (spec.seed + spec.signed)
    # signed and unsigned states of a layer share the seed, so tell them apart: else m and v round alike
    return spec.seed + step * 2 + spec.signed


def rounding_noise(spec: StateSpec, seed: Any, block: Block, device: torch.device, bits: int = 16) -> Tensor:
    """Uniform bits for every element of a block, by global row and column: int32 ``[k, row_numel]``.

    Args:
        seed: from `noise_seed`.
        bits: how many: the upper ones of 16.
    """

    def of_columns() -> Tensor:
        places = torch.arange(spec.shard.row_numel, device=device) + spec.shard.column_offset
        return mix64(places, -1 - seed).to(torch.int32)  # ~seed, of a tensor, too

    if (whole := block.whole) is None:
        (rows,) = block.of_rows(("noise", seed), device, lambda ids: (mix64(ids, seed).to(torch.int32),))  # [k]
        columns = of_columns()
    else:
        rows, columns = whole.memo(("noise", seed), lambda: _hash_all(spec, seed, whole, device))
        rows = rows[block.span]
    return _noise(rows[:, None] ^ columns[None, :], bits)


def _hash_all(spec: StateSpec, seed: Any, whole: Block, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is hashed of all rows and of the columns, in the launches of one hash."""
    rows = whole.row_ids(device)
    columns = torch.arange(spec.shard.row_numel, device=device) + spec.shard.column_offset
    # mix64 adds `seed` times its factor: take it away, and add that of ~seed.
    shift = -1 - 2 * seed
    columns = columns + (shift * FACTOR if isinstance(shift, Tensor) else signed(shift * FACTOR))
    hashed = mix64(torch.cat((rows, columns)), seed).to(torch.int32)
    return hashed[: len(rows)], hashed[len(rows) :]


def _noise(x: Tensor, bits: int) -> Tensor:
    """Mix int32 bits in place (multiplicative hashing, wrapping) into uniform ones, int32 in [0, 2**bits)."""
    x = x.mul_(-1640531527)  # 2**32 / golden ratio, odd
    x.bitwise_xor_(x >> 15).mul_(-2048144789)  # murmur3's first finaliser constant
    return x.bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1)
