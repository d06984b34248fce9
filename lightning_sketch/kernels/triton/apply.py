"""The update of every element."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import gradient, load, row_of, store
from lightning_sketch.kernels.triton.jit import FACTORED, NONE, ROW, ROW_SKETCH, SKETCH, SM3, inlined, kernel
from lightning_sketch.kernels.triton.states import advance, estimate


@inlined
def _preconditioned(
    m: tl.tensor, v: tl.tensor, eps: tl.tensor, correction: tl.tensor, bound: tl.tensor, BOUNDED: tl.constexpr
) -> tl.tensor:
    """``m / (correction * sqrt(v) + eps)``, 0 where v is 0; v may have one column only."""
    root = tl.sqrt_rn(v)
    if BOUNDED:
        limit = root * bound
        m = tl.minimum(tl.maximum(m, -limit), limit)
    update = tl.div_rn(m, tl.broadcast_to(root * correction + eps, m.shape))
    return tl.where(v == 0.0, 0.0, update)


@kernel(
    "rows",
    "column_tiles",
    "groups",
    "row_offset",
    "column_offset",
    "second_width",
    "second_seed",
    "first_width",
    "first_seed",
    "momentum_seed",
)
def apply(
    param: tl.tensor,
    grad: tl.tensor,
    ids: tl.tensor,
    second: tl.tensor,
    second_columns: tl.tensor,  # SM3: the accumulators; FACTORED: columns / their mean; [columns]
    first: tl.tensor,
    momentum: tl.tensor,
    row_largest: tl.tensor,  # SM3: [rows, column_tiles]
    column_largest: tl.tensor,  # SM3: [chunks of rows, columns]
    rows: tl.int64,
    columns: tl.tensor,
    column_tiles: tl.int64,
    groups: tl.int32,
    row_offset: tl.int64,
    column_offset: tl.int64,
    second_decay: tl.float32,
    second_weight: tl.float32,
    second_scale: tl.float32,
    second_width: tl.int64,
    second_seed: tl.int64,
    first_decay: tl.float32,
    first_weight: tl.float32,
    first_scale: tl.float32,
    first_width: tl.int64,
    first_seed: tl.int64,
    momentum_decay: tl.float32,
    momentum_weight: tl.float32,
    momentum_scale: tl.float32,
    momentum_seed: tl.int64,
    sign: tl.float32,
    weight_decay: tl.float32,
    shrink: tl.float32,
    lr: tl.float32,
    eps: tl.float32,
    correction: tl.float32,
    bound: tl.float32,
    nesterov: tl.float32,
    SECOND: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SECOND_DEPTH: tl.constexpr,
    FIRST_DEPTH: tl.constexpr,
    DECAYED: tl.constexpr,
    BOUNDED: tl.constexpr,
    NESTEROV: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Update parameter and states: `groups` times TILE_ROWS rows, and TILE_COLUMNS columns, a program.

    Args:
        WHOLE_ROWS: a tile is as wide as a row, and the row means of ROW are taken here; else they were added before.
    """
    chunk = tl.program_id(0) // column_tiles
    tile = tl.program_id(0) % column_tiles
    column = tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS).to(tl.int64)
    inside = column < columns
    column_id = (column + column_offset).to(tl.uint64)
    largest = tl.zeros([TILE_COLUMNS], tl.float32)
    for group in range(groups):
        i = (chunk * groups + group) * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
        present = i < rows
        row = row_of(ids, i, present)
        row_id = (row + row_offset).to(tl.uint64)
        mask = present[:, None] & inside[None, :]
        at_grad = i[:, None] * columns + column[None, :]
        at = row[:, None] * columns + column[None, :]
        g = gradient(grad, param, at_grad, at, mask, sign, weight_decay, DECAYED)

        m = g
        if FIRST == SKETCH:
            m = estimate(first, row_id, column, mask, columns, first_width, first_seed, first_scale, FIRST_DEPTH, True)
        elif FIRST != NONE:
            m = advance(
                first, at, mask, g, row_id, column_id, first_decay, first_weight, first_scale, first_seed, FIRST
            )

        if SECOND == NONE:
            update = m
            if NESTEROV:
                update = g + m * nesterov
        else:
            if SECOND == ROW:
                stored = load(second, row, present)
                if WHOLE_ROWS:
                    numel = tl.zeros([TILE_ROWS], tl.float32) + columns
                    stored += tl.div_rn(tl.sum(g * g, axis=1), numel) * second_weight
                    tl.store(second + row, stored, mask=present)
                v = (stored * second_scale)[:, None]
            elif SECOND == ROW_SKETCH:
                only = tl.zeros([1], tl.int64)
                v = estimate(
                    second,
                    row_id,
                    only,
                    present[:, None],
                    1,
                    second_width,
                    second_seed,
                    second_scale,
                    SECOND_DEPTH,
                    False,
                )
            elif SECOND == SM3:
                v = (load(second, row, present) * second_scale)[:, None]
                if second_columns is not None:
                    v = tl.minimum(v, load(second_columns, column, inside)[None, :])
                # Beyond the tensor v is 0, as it is nowhere less.
                v = tl.where(mask, v + g * g * second_weight, 0.0)
                tl.store(row_largest + i * column_tiles + tile, tl.max(v, axis=1), mask=present)
                if second_columns is not None:
                    largest = tl.maximum(largest, tl.max(v, axis=0))
            elif SECOND == FACTORED:
                shape = load(second_columns, column, inside)
                v = (load(second, row, present) * second_scale)[:, None] * shape[None, :]
            elif SECOND == SKETCH:
                v = estimate(
                    second,
                    row_id,
                    column,
                    mask,
                    columns,
                    second_width,
                    second_seed,
                    second_scale,
                    SECOND_DEPTH,
                    False,
                )
            else:
                v = advance(
                    second,
                    at,
                    mask,
                    g * g,
                    row_id,
                    column_id,
                    second_decay,
                    second_weight,
                    second_scale,
                    second_seed,
                    SECOND,
                )
            update = _preconditioned(m, v, eps, correction, bound, BOUNDED)

        if MOMENTUM != NONE:
            update = advance(
                momentum,
                at,
                mask,
                update,
                row_id,
                column_id,
                momentum_decay,
                momentum_weight,
                momentum_scale,
                momentum_seed,
                MOMENTUM,
            )
        store(param, at, load(param, at, mask) * shrink - update * lr, mask)
    if SECOND == SM3 and second_columns is not None:
        tl.store(column_largest + chunk * columns + column, largest, mask=inside)
