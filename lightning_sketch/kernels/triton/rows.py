"""Rows of a layer's gradient inside kernels: which there are, and which are not finite."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import load, row_of
from lightning_sketch.kernels.triton.jit import inlined
from lightning_sketch.kernels.triton.table import IDS, ROWS


@inlined
def rows_of_tile(layer: tl.tensor, tile: tl.tensor, SPARSE: tl.constexpr, TILE_ROWS: tl.constexpr) -> tl.tuple:
    """Rows of a tile, int64 ``[TILE_ROWS]``: in the gradient, in the parameter; and whether there are such."""
    i = tile * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
    present = i < tl.load(layer + ROWS)
    if SPARSE:
        row = row_of(tl.load(layer + IDS).to(tl.pointer_type(tl.int64)), i, present)
    else:
        row = i
    return i, row, present


@inlined
def bad_rows(
    grad: tl.tensor,
    i: tl.tensor,
    present: tl.tensor,
    columns: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Whether rows of a tile hold NaN or infinity, ``[TILE_ROWS]``."""
    found = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    lane = tl.arange(0, TILE_COLUMNS)
    for start in range(0, columns, TILE_COLUMNS):
        mask = present[:, None] & ((start + lane) < columns)[None, :]
        # 0 times what is not finite is NaN, and stays so: one instruction for each element.
        found = tl.fma(load(grad, (i * columns + start)[:, None] + lane[None, :], mask), 0.0, found)
    return tl.max((found != found).to(tl.int32), axis=1) != 0
