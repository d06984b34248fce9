"""Insertion of whole rows into sketches, sorted by bucket: one lane owns a bucket, and adds its rows in order."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import bucket_of, gradient, row_of
from lightning_sketch.kernels.triton.jit import kernel
from lightning_sketch.kernels.triton.table import (
    EDGES,
    ENTRY,
    FIRST,
    FIRST_SORTED,
    GRAD,
    HASH_FIRST,
    HASH_SECOND,
    IDS,
    INSERT_FIRST,
    INSERT_SECOND,
    KEY,
    KEYS,
    MEANS,
    PARAM,
    ROW_OFFSET,
    ROWS,
    SECOND,
    SECOND_SORTED,
    SEED,
    SIGN,
    SORTED,
    WEIGHT,
    WEIGHT_DECAY,
    WIDTH,
    find,
    number,
    numel_of_row,
    unaligned,
    values,
)


@kernel("layers")
def hash_rows(
    words: tl.tensor,
    layers: tl.int32,
    OF_SECOND: tl.constexpr,
    DEPTH: tl.constexpr,
    SPARSE: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
) -> None:
    """Store keys of TILE_ROWS rows a program, by which `orders` sorts: buckets of all levels of all layers in turn."""
    layer, tile = find(words, layers, HASH_SECOND if OF_SECOND else HASH_FIRST, SEARCH, True)
    rows_by_bucket = layer + (SECOND_SORTED if OF_SECOND else FIRST_SORTED)
    sketch = layer + (SECOND if OF_SECOND else FIRST)
    rows = tl.load(rows_by_bucket + SORTED)
    i = tile * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
    present = i < rows
    row = i
    if SPARSE:
        row = row_of(tl.load(layer + IDS).to(tl.pointer_type(tl.int64)), i, present)
    row_id = (row + tl.load(layer + ROW_OFFSET)).to(tl.uint64)
    width, seed = tl.load(sketch + WIDTH), tl.load(sketch + SEED).to(tl.uint64)
    keys = tl.load(rows_by_bucket).to(tl.pointer_type(tl.int32))  # where the order will lie
    entry, key = tl.load(rows_by_bucket + ENTRY), tl.load(rows_by_bucket + KEY)
    for level in tl.static_range(DEPTH):
        bucket, _ = bucket_of(row_id, seed, level, width)
        tl.store(keys + entry + level * rows + i, (key + level * width + bucket).to(tl.int32), mask=present)


@kernel("layers")
def insert(
    words: tl.tensor,
    layers: tl.int32,
    INTO_SECOND: tl.constexpr,
    INTO_FIRST: tl.constexpr,
    HALF: tl.constexpr,
    SPARSE: tl.constexpr,
    DECAYED: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    BY_BUCKET: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Add rows to their buckets, in the gradient's order: TILE_SLOTS slots of one level a program.

    A slot has all rows of one bucket, and no other slot has any: nothing is added by two programs.

    Args:
        INTO_SECOND: the sketch of squares, without signs.
        INTO_FIRST: that of the gradient, with signs; where both are, they hash alike.
        LEAVE_OUT: `observe` has stored NaN for the means of rows that are left out.
        BY_BUCKET: a slot for each bucket, else for each row; the first row of a bucket then has them all.
    """
    layer, tile = find(words, layers, INSERT_SECOND if INTO_SECOND else INSERT_FIRST, SEARCH)
    rows_by_bucket = layer + (SECOND_SORTED if INTO_SECOND else FIRST_SORTED)
    sketch = layer + (SECOND if INTO_SECOND else FIRST)
    columns, rows = numel_of_row(layer, ALIGNED), tl.load(rows_by_bucket + SORTED)
    width, seed = tl.load(sketch + WIDTH), tl.load(sketch + SEED).to(tl.uint64)
    grad, param = values(layer, GRAD, HALF, ALIGNED), values(layer, PARAM, HALF, ALIGNED)
    second, first = values(layer, SECOND, False, ALIGNED), values(layer, FIRST, False, ALIGNED)
    second_weight, first_weight = number(layer, SECOND + WEIGHT), number(layer, FIRST + WEIGHT)
    sign, weight_decay = number(layer, SIGN), number(layer, WEIGHT_DECAY)
    row_offset = tl.load(layer + ROW_OFFSET)
    ids = tl.load(layer + IDS).to(tl.pointer_type(tl.int64))
    means = unaligned(layer, MEANS)

    slots = width if BY_BUCKET else rows
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    column = (tile % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    tile = tile // column_tiles
    slot_tiles = tl.cdiv(slots, TILE_SLOTS)
    slot = (tile % slot_tiles) * TILE_SLOTS + tl.arange(0, TILE_SLOTS).to(tl.int64)
    level = tile // slot_tiles

    order = tl.load(rows_by_bucket).to(tl.pointer_type(tl.int32))
    edges = tl.load(rows_by_bucket + EDGES).to(tl.pointer_type(tl.int32))
    entry = tl.load(rows_by_bucket + ENTRY) + level * rows
    key = tl.load(rows_by_bucket + KEY) + level * width
    inside = (slot < slots) & (tl.load(layer + ROWS) != 0)  # else the step is to change nothing
    if BY_BUCKET:
        bucket = slot
        start = tl.load(edges + key + slot, mask=inside, other=0).to(tl.int64)
        count = tl.load(edges + key + slot + 1, mask=inside, other=0).to(tl.int64) - start
    else:
        keys = tl.load(rows_by_bucket + KEYS).to(tl.pointer_type(tl.int32))
        start = entry + slot
        found = tl.load(keys + start, mask=inside, other=0)
        before = tl.load(keys + start - 1, mask=inside & (start > 0), other=-1)
        bucket = found.to(tl.int64) - key
        end = tl.load(edges + start, mask=inside & (found != before), other=0).to(tl.int64)
        count = tl.maximum(end - start, 0)

    at_table = (bucket + level * width)[:, None] * columns + column[None, :]
    used = (count > 0)[:, None] & (column < columns)[None, :]
    squares = tl.zeros([TILE_SLOTS, TILE_COLUMNS], tl.float32)
    signed = tl.zeros([TILE_SLOTS, TILE_COLUMNS], tl.float32)
    if INTO_SECOND:
        squares = tl.load(second + at_table, mask=used, other=0.0)
    if INTO_FIRST:
        signed = tl.load(first + at_table, mask=used, other=0.0)
    coming = tl.load(order + start, mask=count > 0, other=0)
    for step in range(tl.max(count, axis=0)):
        here = step < count
        i = coming.to(tl.int64) - entry
        coming = tl.load(order + start + step + 1, mask=step + 1 < count, other=0)  # while the row is waited for
        if LEAVE_OUT:
            mean = tl.load(means + i, mask=here, other=0.0)
            here = here & (mean == mean)
        row = i
        if SPARSE:
            row = row_of(ids, i, here)
        mask = here[:, None] & (column < columns)[None, :]
        at = i[:, None] * columns + column[None, :]
        at_param = row[:, None] * columns + column[None, :]
        g = gradient(grad, param, at, at_param, mask, sign, weight_decay, DECAYED)
        if INTO_SECOND:
            squares += g * g * second_weight
        if INTO_FIRST:
            _, signs = bucket_of((row + row_offset).to(tl.uint64), seed, level, width)
            signed += g * (signs * first_weight)[:, None]
    if INTO_SECOND:
        tl.store(second + at_table, squares, mask=used)
    if INTO_FIRST:
        tl.store(first + at_table, signed, mask=used)
