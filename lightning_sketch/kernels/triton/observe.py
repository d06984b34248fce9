"""What is seen of the gradient before anything changes: squares of rows and columns, and rows that are not finite.

`observe` only streams: it reads a chunk of the columns of a block of rows, and leaves partial sums of rows and columns.
`settle` makes means of the rows' sums and judges them. Where a row has only one chunk, `observe` does both.
"""

from __future__ import annotations

import math

import triton.language as tl

from lightning_sketch.kernels.schema import MOST_MEAN
from lightning_sketch.kernels.triton.bits import bucket_of, gradient
from lightning_sketch.kernels.triton.jit import FACTORED, ROW_SKETCH, inlined, kernel
from lightning_sketch.kernels.triton.quantized import store_hashes
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
    ROW_SUMS,
    ROWS,
    SECOND,
    SEED,
    SETTLE,
    SIGN,
    WEIGHT_DECAY,
    WIDTH,
    find,
    number,
    numel_of_row,
    unaligned,
    values,
)

_MOST_MEAN = tl.constexpr(MOST_MEAN)
_INFINITY = tl.constexpr(math.inf)


@inlined
def _stream(
    layer: tl.tensor,
    block: tl.tensor,
    chunk: tl.tensor,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    SPARSE: tl.constexpr,
    DECAYED: tl.constexpr,
    ALIGNED: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Store sums of squares of a block's rows over a chunk of TILE_COLUMNS columns; of FACTORED, those of columns.

    Args:
        AGAIN: only sums of columns, and of rows whose means are not NaN.
    """
    columns, rows = numel_of_row(layer, ALIGNED), tl.load(layer + ROWS)
    grad, param = values(layer, GRAD, HALF, ALIGNED), values(layer, PARAM, HALF, ALIGNED)
    sign, weight_decay = number(layer, SIGN), number(layer, WEIGHT_DECAY)
    row_sums = unaligned(layer, ROW_SUMS) + chunk * rows
    column = chunk * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = column < columns
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    STEPS: tl.constexpr = BLOCK_ROWS // TILE_ROWS
    for step in range(STEPS):
        i, row, present = rows_of_tile(layer, block * STEPS + step, SPARSE, TILE_ROWS)
        here = present
        if AGAIN:
            means = tl.load(unaligned(layer, MEANS) + i, mask=present, other=0.0)
            here = present & (means == means)
        mask = here[:, None] & inside[None, :]
        at = (i * columns)[:, None] + column[None, :]
        at_param = (row * columns)[:, None] + column[None, :]
        g = gradient(grad, param, at, at_param, mask, sign, weight_decay, DECAYED)
        squares = g * g
        if KIND == FACTORED:
            total += squares
        if not AGAIN:
            tl.store(row_sums + i, tl.sum(squares, axis=1), mask=present)
    if KIND == FACTORED:
        tl.store(unaligned(layer, PARTIALS) + block * columns + column, tl.sum(total, axis=0), mask=inside)


@inlined
def _settle(
    layer: tl.tensor,
    block: tl.tensor,
    KIND: tl.constexpr,
    DEPTH: tl.constexpr,
    HALF: tl.constexpr,
    SPARSE: tl.constexpr,
    DECAYED: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    HASH_SECOND: tl.constexpr,
    HASH_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Store means of a block's rows, from their sums over all chunks, in the order of the chunks.

    The first block also hashes the columns, for states with codes: a launch less.
    """
    if HASH_SECOND or HASH_FIRST:
        if block == 0:
            for start in range(0, numel_of_row(layer, ALIGNED), TILE_COLUMNS):
                store_hashes(layer, start, HASH_SECOND, HASH_FIRST, TILE_COLUMNS)
    columns, rows = numel_of_row(layer, ALIGNED), tl.load(layer + ROWS)
    chunks = tl.cdiv(columns, TILE_COLUMNS)
    i, row, present = rows_of_tile(layer, block, SPARSE, BLOCK_ROWS)
    row_sums = unaligned(layer, ROW_SUMS)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for chunk in range(chunks):
        sums += tl.load(row_sums + chunk * rows + i, mask=present, other=0.0)
    means = sums * number(layer, OF_COLUMN)
    held = unaligned(layer, MEANS)
    good = present
    if LEAVE_OUT:
        # A finite sum has finite terms only. One that is not may just have overflowed.
        LIMIT: tl.constexpr = _MOST_MEAN if KIND == FACTORED else _INFINITY
        doubtful = present & ((means < LIMIT) == 0)
        if tl.max(doubtful.to(tl.int32), axis=0) != 0:
            bad = doubtful
            if KIND != FACTORED:
                # A narrow tile, whose registers do not matter to what is done every time.
                bad = bad_rows(
                    values(layer, GRAD, HALF, ALIGNED), i, doubtful, columns, BLOCK_ROWS, max(1, 2048 // BLOCK_ROWS)
                )
            good = present & (bad == 0)
            means = tl.where(bad, float("nan"), means)
            tl.atomic_add(
                tl.load(layer + LEFT_OUT).to(tl.pointer_type(tl.int64)), tl.sum(bad.to(tl.int32), axis=0).to(tl.int64)
            )
            if KIND == FACTORED:
                tl.store(held + i, means, mask=present)
                tl.debug_barrier()  # read by other threads than those that store
                for chunk in range(chunks):
                    _stream(
                        layer,
                        block,
                        chunk,
                        KIND,
                        HALF,
                        SPARSE,
                        DECAYED,
                        ALIGNED,
                        True,
                        BLOCK_ROWS,
                        TILE_ROWS,
                        TILE_COLUMNS,
                    )
    tl.store(held + i, means, mask=present)
    if KIND == ROW_SKETCH:
        exponents = tl.load(layer + EXPONENTS).to(tl.pointer_type(tl.int32))
        width, seed = tl.load(layer + SECOND + WIDTH), tl.load(layer + SECOND + SEED).to(tl.uint64)
        row_id = (row + tl.load(layer + ROW_OFFSET)).to(tl.uint64)
        bits = means.to(tl.int32, bitcast=True)
        exponent = tl.where(means == means, (bits >> 23) & 0xFF, 256)  # 255: infinite; 256: NaN
        for level in tl.static_range(DEPTH):
            bucket, _ = bucket_of(row_id, seed, level, width)
            tl.atomic_max(exponents + level * width + bucket, exponent, mask=good)


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
    HASH_SECOND: tl.constexpr,
    HASH_FIRST: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """A program sees a chunk of TILE_COLUMNS columns of BLOCK_ROWS rows, and stores sums of their squares.

    Args:
        KIND: of the second moment.
        ONE_CHUNK: a row has no more columns; the program also does what `settle` does.
    """
    layer, tile = find(words, layers, OBSERVE, SEARCH)
    if ONE_CHUNK:
        block = tile
        chunk = tile * 0
    else:
        chunks = tl.cdiv(numel_of_row(layer, ALIGNED), TILE_COLUMNS)
        block = tile // chunks
        chunk = tile % chunks
    _stream(
        layer, block, chunk, KIND, HALF, SPARSE, DECAYED, ALIGNED, False, BLOCK_ROWS, TILE_ROWS, TILE_COLUMNS
    )  # fmt: skip
    if ONE_CHUNK:
        tl.debug_barrier()  # sums are read by other threads than those that store them
        _settle(
            layer, block, KIND, DEPTH, HALF, SPARSE, DECAYED, LEAVE_OUT, HASH_SECOND, HASH_FIRST, ALIGNED, BLOCK_ROWS,
            TILE_ROWS, TILE_COLUMNS,
        )  # fmt: skip


@kernel("layers")
def settle(
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
    HASH_SECOND: tl.constexpr,
    HASH_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """A program stores the means of BLOCK_ROWS rows' squares.

    With LEAVE_OUT rows that are not finite are counted, enter no other sum, and have NaN for a mean: where a block has
    one, its sums of columns are made once more. Of ROW_SKETCH the largest exponent is found for each bucket, to which
    `add_rows` aligns what it adds up.
    """
    layer, block = find(words, layers, SETTLE, SEARCH)
    _settle(
        layer, block, KIND, DEPTH, HALF, SPARSE, DECAYED, LEAVE_OUT, HASH_SECOND, HASH_FIRST, ALIGNED, BLOCK_ROWS,
        TILE_ROWS, TILE_COLUMNS,
    )  # fmt: skip
