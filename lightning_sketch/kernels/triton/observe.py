"""What is seen of the gradient before anything changes: squares of rows and columns, and rows that are not finite."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import bucket_of, gradient
from lightning_sketch.kernels.triton.jit import FACTORED, ROW_SKETCH, inlined, kernel
from lightning_sketch.kernels.triton.rows import bad_rows, rows_of_tile
from lightning_sketch.kernels.triton.table import (
    EXPONENTS,
    GRAD,
    LEFT_OUT,
    MEANS,
    OBSERVE,
    OF_COLUMN,
    PARAM,
    PARTIALS,
    ROW_OFFSET,
    SECOND,
    SEED,
    SIGN,
    WEIGHT_DECAY,
    WIDTH,
    find,
    number,
    numel_of_row,
    unaligned,
    values,
)


@inlined
def _squares(
    layer: tl.tensor,
    tile: tl.tensor,
    i: tl.tensor,
    row: tl.tensor,
    good: tl.tensor,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    DECAYED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Sums of squares of a tile's rows, ``[TILE_ROWS]``; of FACTORED, those of columns are stored."""
    columns = numel_of_row(layer, ALIGNED)
    grad, param = values(layer, GRAD, HALF, ALIGNED), values(layer, PARAM, HALF, ALIGNED)
    sign, weight_decay = number(layer, SIGN), number(layer, WEIGHT_DECAY)
    partials = unaligned(layer, PARTIALS) + tile * columns
    lane = tl.arange(0, TILE_COLUMNS)
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for start in range(0, columns, TILE_COLUMNS):
        inside = (start + lane) < columns
        mask = good[:, None] & inside[None, :]
        at = (i * columns + start)[:, None] + lane[None, :]
        at_param = (row * columns + start)[:, None] + lane[None, :]
        g = gradient(grad, param, at, at_param, mask, sign, weight_decay, DECAYED)
        total += g * g
        if KIND == FACTORED:
            tl.store(partials + start + lane, tl.sum(g * g, axis=0), mask=inside)
    return tl.sum(total, axis=1)


@kernel("layers")
def observe(
    words: tl.tensor,
    layers: tl.int32,
    KIND: tl.constexpr,
    DEPTH: tl.constexpr,
    HALF: tl.constexpr,
    SPARSE: tl.constexpr,
    DECAYED: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """A program sees TILE_ROWS rows, and stores the means of their squares.

    With LEAVE_OUT rows that are not finite are counted, enter no other sum, and have NaN for a mean. Of ROW_SKETCH the
    largest exponent is found for each bucket, to which `add` aligns what it adds up.

    Args:
        KIND: of the second moment.
    """
    layer, tile = find(words, layers, OBSERVE, SEARCH)
    i, row, present = rows_of_tile(layer, tile, SPARSE, TILE_ROWS)
    columns = numel_of_row(layer, ALIGNED)
    sums = _squares(layer, tile, i, row, present, KIND, HALF, DECAYED, ALIGNED, TILE_ROWS, TILE_COLUMNS)
    good = present
    if LEAVE_OUT:
        # A finite sum has finite terms only. One that is not may just have overflowed.
        if tl.max((present & ((sums < float("inf")) == 0)).to(tl.int32), axis=0) != 0:
            grad = values(layer, GRAD, HALF, ALIGNED)
            bad = bad_rows(grad, i, present, columns, TILE_ROWS, TILE_COLUMNS)
            good = present & (bad == 0)
            if KIND == FACTORED:
                _squares(layer, tile, i, row, good, KIND, HALF, DECAYED, ALIGNED, TILE_ROWS, TILE_COLUMNS)
            sums = tl.where(bad, float("nan"), sums)
            tl.atomic_add(
                tl.load(layer + LEFT_OUT).to(tl.pointer_type(tl.int64)),
                tl.sum((present & bad).to(tl.int32), axis=0).to(tl.int64),
            )
    means = sums * number(layer, OF_COLUMN)
    tl.store(unaligned(layer, MEANS) + i, means, mask=present)
    if KIND == ROW_SKETCH:
        exponents = tl.load(layer + EXPONENTS).to(tl.pointer_type(tl.int32))
        width, seed = tl.load(layer + SECOND + WIDTH), tl.load(layer + SECOND + SEED).to(tl.uint64)
        row_id = (row + tl.load(layer + ROW_OFFSET)).to(tl.uint64)
        bits = means.to(tl.int32, bitcast=True)
        exponent = tl.where(means == means, (bits >> 23) & 0xFF, 256)  # 255: infinite; 256: NaN
        for level in tl.static_range(DEPTH):
            bucket, _ = bucket_of(row_id, seed, level, width)
            tl.atomic_max(exponents + level * width + bucket, exponent, mask=good)
