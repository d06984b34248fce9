"""Insertion of rows into one depth of a sketch."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import bucket_of, gradient, load, row_of
from lightning_sketch.kernels.triton.jit import kernel


@kernel("rows", "row_offset", "level", "width", "seed")
def hash_rows(
    ids: tl.tensor,
    buckets: tl.tensor,  # int32 [rows]
    rows: tl.int64,
    row_offset: tl.int64,
    level: tl.int64,
    width: tl.int64,
    seed: tl.int64,
    TILE: tl.constexpr,
) -> None:
    """Buckets of the gradient's rows."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row_id = (row_of(ids, i, i < rows) + row_offset).to(tl.uint64)
    bucket, _ = bucket_of(row_id, seed.to(tl.uint64), level, width)
    tl.store(buckets + i, bucket.to(tl.int32), mask=i < rows)


@kernel("slots", "column_tiles", "row_offset", "level", "width", "seed")
def insert_rows(
    grad: tl.tensor,
    param: tl.tensor,
    ids: tl.tensor,
    buckets: tl.tensor,  # int32 [rows], sorted
    order: tl.tensor,  # int64 [rows]: where the gradient's row of each sorted bucket lies
    begin: tl.tensor,  # int64 [slots]: the first sorted row of a slot
    end: tl.tensor,  # int64 [slots]: after its last; equal to `begin` for none
    second: tl.tensor,  # [width, columns], without signs, of squares; or None
    first: tl.tensor,  # [width, columns], with signs; or None
    slots: tl.int64,
    columns: tl.tensor,
    column_tiles: tl.int64,
    row_offset: tl.int64,
    level: tl.int64,
    width: tl.int64,
    seed: tl.int64,
    second_weight: tl.float32,
    first_weight: tl.float32,
    sign: tl.float32,
    weight_decay: tl.float32,
    DECAYED: tl.constexpr,
    SQUARED: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Add the rows of each slot to its bucket, in the gradient's order: TILE_SLOTS buckets a program.

    A slot has all rows of one bucket, and no other slot has any: nothing is added by two programs.

    Args:
        SQUARED: whether `grad` is squares already (means of rows).
    """
    column = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS).to(tl.int64)
    slot = (tl.program_id(0) // column_tiles) * TILE_SLOTS + tl.arange(0, TILE_SLOTS).to(tl.int64)
    start = tl.load(begin + slot, mask=slot < slots, other=0)
    count = tl.load(end + slot, mask=slot < slots, other=0) - start
    bucket = tl.load(buckets + start, mask=count > 0, other=0).to(tl.int64)
    at_table = bucket[:, None] * columns + column[None, :]
    used = (count > 0)[:, None] & (column < columns)[None, :]
    squares = tl.zeros([TILE_SLOTS, TILE_COLUMNS], tl.float32)
    signed = tl.zeros([TILE_SLOTS, TILE_COLUMNS], tl.float32)
    if second is not None:
        squares = load(second, at_table, used)
    if first is not None:
        signed = load(first, at_table, used)
    for step in range(tl.max(count, axis=0)):
        here = step < count
        i = tl.load(order + start + step, mask=here, other=0)
        row = row_of(ids, i, here)
        mask = here[:, None] & (column < columns)[None, :]
        at = i[:, None] * columns + column[None, :]
        at_param = row[:, None] * columns + column[None, :]
        g = gradient(grad, param, at, at_param, mask, sign, weight_decay, DECAYED)
        if second is not None:
            x = g if SQUARED else g * g
            squares += x * second_weight
        if first is not None:
            _, signs = bucket_of((row + row_offset).to(tl.uint64), seed.to(tl.uint64), level, width)
            signed += g * (signs * first_weight)[:, None]
    if second is not None:
        tl.store(second + at_table, squares, mask=used)
    if first is not None:
        tl.store(first + at_table, signed, mask=used)
