"""Sums of squares of the gradient's rows and columns."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import gradient, row_of
from lightning_sketch.kernels.triton.jit import kernel


@kernel("rows", "column_tiles", "groups")
def sum_squares(
    grad: tl.tensor,
    param: tl.tensor,
    ids: tl.tensor,
    row_sums: tl.tensor,  # [rows, column_tiles]
    column_sums: tl.tensor,  # [chunks of rows, columns], or None
    rows: tl.int64,
    columns: tl.tensor,
    column_tiles: tl.int64,
    groups: tl.int32,
    sign: tl.float32,
    weight_decay: tl.float32,
    DECAYED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Partial sums: of a chunk of `groups` times TILE_ROWS rows, and TILE_COLUMNS columns, a program."""
    chunk = tl.program_id(0) // column_tiles
    tile = tl.program_id(0) % column_tiles
    column = tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS).to(tl.int64)
    total = tl.zeros([TILE_COLUMNS], tl.float32)
    for group in range(groups):
        i = (chunk * groups + group) * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
        row = row_of(ids, i, i < rows)
        mask = (i < rows)[:, None] & (column < columns)[None, :]
        at = i[:, None] * columns + column[None, :]
        at_param = row[:, None] * columns + column[None, :]
        g = gradient(grad, param, at, at_param, mask, sign, weight_decay, DECAYED)
        tl.store(row_sums + i * column_tiles + tile, tl.sum(g * g, axis=1), mask=i < rows)
        if column_sums is not None:
            total += tl.sum(g * g, axis=0)
    if column_sums is not None:
        tl.store(column_sums + chunk * columns + column, total, mask=column < columns)
