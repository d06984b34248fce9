"""Sums and maxima of columns, once all programs have left theirs."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import greater
from lightning_sketch.kernels.triton.jit import kernel
from lightning_sketch.kernels.triton.table import (
    ALL_ROWS,
    CHUNKS,
    COLUMN_WEIGHT,
    COLUMNS,
    FINISH,
    FLOOR,
    GROUPS,
    LARGEST,
    LEFT_OUT,
    PARTIALS,
    REDUCE,
    SECOND,
    SHAPE,
    STATE_COLUMNS,
    WORDS,
    find,
    number,
    unaligned,
)


@kernel("layers")
def reduce_columns(
    words: tl.tensor,
    layers: tl.int32,
    GROUP: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Add up GROUP of the partial sums ``[chunks, columns]`` that `observe` left, TILE_COLUMNS columns a program."""
    layer, tile = find(words, layers, REDUCE, SEARCH)
    columns = tl.load(layer + COLUMNS)
    chunks = tl.load(layer + CHUNKS)
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    group = tile // column_tiles
    column = (tile % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    partials = unaligned(layer, PARTIALS)
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for start in tl.static_range(0, GROUP, TILE_ROWS):
        chunk = group * GROUP + start + tl.arange(0, TILE_ROWS)
        mask = (chunk < chunks)[:, None] & (column < columns)[None, :]
        total += tl.load(partials + (chunk * columns)[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(unaligned(layer, GROUPS) + group * columns + column, tl.sum(total, axis=0), mask=column < columns)


@kernel("layers")
def finish_factored(
    words: tl.tensor, layers: tl.int32, HELD: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
) -> None:
    """A program for each layer: add the sums of columns to their means, and store these divided by their mean.

    Behind them is what is added to every row.

    Args:
        HELD: the means hold the step already: there are no sums.
    """
    layer = words + tl.program_id(0) * WORDS
    columns = tl.load(layer + COLUMNS)
    groups = tl.cdiv(tl.load(layer + CHUNKS), GROUP)
    if HELD:
        groups = groups * 0
    sums, held = unaligned(layer, GROUPS), unaligned(layer, SECOND + STATE_COLUMNS)
    weight = number(layer, SECOND + COLUMN_WEIGHT)
    lane = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, columns, TILE):
        column = start + lane
        added = tl.zeros([TILE], tl.float32)
        for group in range(groups):
            added += tl.load(sums + group * columns + column, mask=column < columns, other=0.0)
        means = tl.load(held + column, mask=column < columns, other=0.0) + added * weight
        tl.store(held + column, means, mask=column < columns)
        total += means
    mean = tl.sum(total, axis=0) / columns.to(tl.float32)
    shape = unaligned(layer, SHAPE)
    tl.debug_barrier()
    for start in range(0, columns, TILE):
        column = start + lane
        means = tl.load(held + column, mask=column < columns, other=0.0)
        relative = tl.div_rn(means, tl.zeros([TILE], tl.float32) + mean)
        # 0/0 := 0 before the first gradient
        tl.store(shape + column, tl.where(relative == relative, relative, 0.0), mask=column < columns)
    tl.store(shape + columns, mean * number(layer, SECOND + FLOOR))


@kernel("layers")
def finish_sm3(words: tl.tensor, layers: tl.int32, SEARCH: tl.constexpr, TILE: tl.constexpr) -> None:
    """Assign the maxima of TILE columns a program."""
    layer, tile = find(words, layers, FINISH, SEARCH)
    column = tile * TILE + tl.arange(0, TILE)
    mask = column < tl.load(layer + COLUMNS)
    held = unaligned(layer, SECOND + STATE_COLUMNS)
    largest = tl.load(unaligned(layer, LARGEST) + column, mask=mask, other=0.0)
    left_out = tl.load(tl.load(layer + LEFT_OUT).to(tl.pointer_type(tl.int64)))
    # With every row present the maximum is assigned (so it can fall); absent rows are bounded by the old value.
    if (tl.load(layer + ALL_ROWS) == 0) | (left_out != 0):
        before = tl.load(held + column, mask=mask, other=0.0) * number(layer, SECOND + COLUMN_WEIGHT)
        largest = greater(largest, before)
    tl.store(held + column, largest, mask=mask)
