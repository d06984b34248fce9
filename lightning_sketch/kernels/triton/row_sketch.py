"""Means of rows into a sketch of row scalars, the same bits in any order of programs.

Sums of floats depend on their order; sums of integers do not. The mantissas of all means that fall into a bucket are
aligned to the largest exponent among them (`observe` found it), added up as int64, and made a float again. A mean keeps
44 bits below the largest of its bucket, and counts for at least the last of them: none is lost.
"""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import bucket_of
from lightning_sketch.kernels.triton.jit import kernel
from lightning_sketch.kernels.triton.rows import rows_of_tile
from lightning_sketch.kernels.triton.table import (
    ADD,
    EXPONENTS,
    FOLD,
    MEANS,
    ROW_OFFSET,
    SECOND,
    SEED,
    SUMS,
    WEIGHT,
    WIDTH,
    find,
    number,
    unaligned,
)


@kernel("layers")
def add_rows(
    words: tl.tensor,
    layers: tl.int32,
    DEPTH: tl.constexpr,
    SPARSE: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
) -> None:
    """Add the mantissas of TILE_ROWS means a program; those of means that are not finite say nothing."""
    layer, tile = find(words, layers, ADD, SEARCH)
    i, row, present = rows_of_tile(layer, tile, SPARSE, TILE_ROWS)
    sums = tl.load(layer + SUMS).to(tl.pointer_type(tl.int64))
    exponents = tl.load(layer + EXPONENTS).to(tl.pointer_type(tl.int32))
    width, seed = tl.load(layer + SECOND + WIDTH), tl.load(layer + SECOND + SEED).to(tl.uint64)
    row_id = (row + tl.load(layer + ROW_OFFSET)).to(tl.uint64)
    bits = tl.load(unaligned(layer, MEANS) + i, mask=present, other=0.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    here = present & (exponent < 255)
    mantissa = ((bits & 0x7FFFFF) | tl.where(exponent > 0, 0x800000, 0)).to(tl.int64) << 20
    exponent = tl.maximum(exponent, 1)  # of numbers below the normal ones
    for level in tl.static_range(DEPTH):
        bucket, _ = bucket_of(row_id, seed, level, width)
        at = level * width + bucket
        largest = tl.maximum(tl.load(exponents + at, mask=here, other=1), 1)
        aligned = mantissa >> tl.minimum(largest - exponent, 62).to(tl.int64)
        aligned = tl.where(mantissa > 0, tl.maximum(aligned, 1), 0)
        tl.atomic_add(sums + at, aligned, mask=here)


@kernel("layers")
def fold_rows(
    words: tl.tensor,
    layers: tl.int32,
    DEPTH: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Add TILE sums a program to the table, ``[depth, width]``."""
    layer, tile = find(words, layers, FOLD, SEARCH)
    at = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    here = at < tl.load(layer + SECOND + WIDTH) * DEPTH
    sums = tl.load(layer + SUMS).to(tl.pointer_type(tl.int64))
    exponents = tl.load(layer + EXPONENTS).to(tl.pointer_type(tl.int32))
    table = unaligned(layer, SECOND)
    mantissa = tl.load(sums + at, mask=here, other=0).to(tl.float32) * (1.0 / 8796093022208.0)  # 2**-43
    exponent = tl.load(exponents + at, mask=here, other=0)
    power = (tl.minimum(tl.maximum(exponent, 1), 254) << 23).to(tl.float32, bitcast=True)  # 2 ** (exponent - 127)
    added = mantissa * power * number(layer, SECOND + WEIGHT)
    added = tl.where(exponent == 255, float("inf"), added)
    added = tl.where(exponent == 256, float("nan"), added)
    tl.store(table + at, tl.load(table + at, mask=here, other=0.0) + added, mask=here)
