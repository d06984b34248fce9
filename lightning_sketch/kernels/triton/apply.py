"""The update of every element."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import chosen, gradient, greater, lesser, load, not_finite_bits, store
from lightning_sketch.kernels.triton.jit import FACTORED, NONE, QUANTIZED, ROW, ROW_SKETCH, SKETCH, SM3, inlined, kernel
from lightning_sketch.kernels.triton.quantized import codes_before, encode, four_each, hash_mixed, hashes_of, inside_row
from lightning_sketch.kernels.triton.rows import bad_rows, rows_of_tile
from lightning_sketch.kernels.triton.states import advance, estimate
from lightning_sketch.kernels.triton.table import (
    APPLY,
    BOUND,
    COLUMN_OFFSET,
    COLUMN_WEIGHT,
    CORRECTION,
    DECAY,
    DECAY_FACTOR,
    EPS,
    FIRST,
    GRAD,
    LARGEST,
    LEFT_OUT,
    LR,
    MEANS,
    MOMENTUM,
    NESTEROV,
    OF_COLUMN,
    OF_SCALE,
    PARAM,
    ROW_OFFSET,
    SCALE,
    SECOND,
    SEED,
    SHAPE,
    SIGN,
    SPLITS,
    STATE_COLUMNS,
    WEIGHT,
    WEIGHT_DECAY,
    WIDTH,
    find,
    number,
    numel_of_row,
    unaligned,
    values,
)


@inlined
def _preconditioned(
    m: tl.tensor,
    v: tl.tensor,
    eps: tl.tensor,
    correction: tl.tensor,
    bound: tl.tensor,
    BOUNDED: tl.constexpr,
    FAST: tl.constexpr,
) -> tl.tensor:
    """``m / (correction * sqrt(v) + eps)``, 0 where v is 0; v may have one column only.

    Args:
        FAST: up to two units in the last place off, where arithmetic and not memory takes the time.
    """
    if FAST:
        root = tl.sqrt(v)
    else:
        root = tl.sqrt_rn(v)
    if BOUNDED:
        limit = root * bound
        m = tl.where(m > limit, limit, tl.where(m < -limit, -limit, m))  # NaN stays NaN
    divisor = tl.broadcast_to(root * correction + eps, m.shape)
    if FAST:
        update = m / divisor
    else:
        update = tl.div_rn(m, divisor)
    return tl.where(v == 0.0, 0.0, update)


@kernel("layers")
def apply(
    words: tl.tensor,
    layers: tl.int32,
    SECOND_KIND: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    MOMENTUM_KIND: tl.constexpr,
    HALF: tl.constexpr,
    SECOND_HALF: tl.constexpr,
    FIRST_HALF: tl.constexpr,
    MOMENTUM_HALF: tl.constexpr,
    SECOND_DEPTH: tl.constexpr,
    FIRST_DEPTH: tl.constexpr,
    SECOND_BLOCK: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    SPARSE: tl.constexpr,
    DECAYED: tl.constexpr,
    BOUNDED: tl.constexpr,
    NESTEROV_USED: tl.constexpr,
    COLUMNS_USED: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    OBSERVED: tl.constexpr,
    HELD: tl.constexpr,
    BY_ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SPAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Update parameter and states: TILE_ROWS rows a program, all of their columns or SPAN of them.

    Args:
        SECOND_DEPTH, FIRST_DEPTH: of sketches; bits (QUANTIZED).
        SECOND_BLOCK, FIRST_BLOCK: elements of a block (QUANTIZED).
        COLUMNS_USED: whether SM3 has accumulators of columns.
        LEAVE_OUT: what is not finite in the gradient changes nothing.
        OBSERVED: `observe` has stored the means of rows, NaN for those to be left out.
        HELD: the second state (ROW, ROW_SKETCH, FACTORED) holds this step already.
        BY_ROWS: rows are left out, else elements.
        AT_ONCE: a row is no wider than TILE_COLUMNS.
        SPAN: 0 for all columns.
    """
    BY_ELEMENTS: tl.constexpr = LEAVE_OUT and not BY_ROWS
    # Whether the gradient stays in registers between two looks at it, and the parameter is read ahead; of many narrow
    # rows that would take too many.
    KEPT: tl.constexpr = SECOND_KIND == ROW and AT_ONCE and not OBSERVED and not HELD
    AHEAD: tl.constexpr = KEPT and TILE_ROWS <= 8
    layer, tile = find(words, layers, APPLY, SEARCH)
    columns = numel_of_row(layer, ALIGNED)
    if SPAN:
        splits = tl.load(layer + SPLITS)
        begin = (tile % splits) * SPAN
        end = tl.minimum(begin + SPAN, columns)
        tile = tile // splits
    else:
        begin = 0
        end = columns
        if KEPT:
            end = TILE_COLUMNS  # known to be one tile, whose registers serve both
    i, row, present = rows_of_tile(layer, tile, SPARSE, TILE_ROWS)
    row_id = (row + tl.load(layer + ROW_OFFSET)).to(tl.uint64)
    lane = tl.arange(0, TILE_COLUMNS)
    CODED: tl.constexpr = FIRST_KIND == QUANTIZED or SECOND_KIND == QUANTIZED
    if CODED:
        lane = four_each(TILE_COLUMNS)

    grad, param = values(layer, GRAD, HALF, ALIGNED), values(layer, PARAM, HALF, ALIGNED)
    first = values(layer, FIRST, FIRST_HALF, ALIGNED)
    momentum = values(layer, MOMENTUM, MOMENTUM_HALF, ALIGNED)
    second = values(layer, SECOND, SECOND_HALF, ALIGNED)
    held = unaligned(layer, SECOND + STATE_COLUMNS)  # SM3
    shape = unaligned(layer, SHAPE)  # FACTORED
    largest = tl.load(layer + LARGEST).to(tl.pointer_type(tl.int32))  # SM3
    left_out = tl.load(layer + LEFT_OUT).to(tl.pointer_type(tl.int64))
    sign, weight_decay = number(layer, SIGN), number(layer, WEIGHT_DECAY)
    decay_factor, lr, eps = number(layer, DECAY_FACTOR), number(layer, LR), number(layer, EPS)
    correction, bound, nesterov = number(layer, CORRECTION), number(layer, BOUND), number(layer, NESTEROV)
    second_weight, second_scale = number(layer, SECOND + WEIGHT), number(layer, SECOND + SCALE)
    second_width, second_seed = tl.load(layer + SECOND + WIDTH), tl.load(layer + SECOND + SEED)
    first_width, first_seed = tl.load(layer + FIRST + WIDTH), tl.load(layer + FIRST + SEED)
    momentum_seed = tl.load(layer + MOMENTUM + SEED)
    second_decay, first_decay = number(layer, SECOND + DECAY), number(layer, FIRST + DECAY)
    momentum_decay, momentum_weight = number(layer, MOMENTUM + DECAY), number(layer, MOMENTUM + WEIGHT)
    first_weight, first_scale = number(layer, FIRST + WEIGHT), number(layer, FIRST + SCALE)
    momentum_scale = number(layer, MOMENTUM + SCALE)
    column_offset = tl.load(layer + COLUMN_OFFSET)

    # QUANTIZED
    first_codes, first_absmax = tl.load(layer + FIRST), tl.load(layer + FIRST + STATE_COLUMNS)
    second_codes, second_absmax = tl.load(layer + SECOND), tl.load(layer + SECOND + STATE_COLUMNS)
    first_noise, second_noise = hash_mixed(row_id, first_seed), hash_mixed(row_id, second_seed)
    second_hashes, first_hashes = hashes_of(layer, False), hashes_of(layer, SECOND_KIND == QUANTIZED)

    # Of each row: whether it is stepped, and what its second moment is.
    good = present
    whole = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    whole_param = whole
    stored = tl.zeros([TILE_ROWS], tl.float32)
    means = stored
    if OBSERVED:
        means = tl.load(unaligned(layer, MEANS) + i, mask=present, other=0.0)
        if LEAVE_OUT:
            good = present & (means == means)
    elif SECOND_KIND == ROW and not HELD:
        squares = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
        for start in range(begin, end, TILE_COLUMNS):
            mask = present[:, None] & ((start + lane) < columns)[None, :]
            at_grad = (i * columns + start)[:, None] + lane[None, :]
            at = (row * columns + start)[:, None] + lane[None, :]
            g = gradient(grad, param, at_grad, at, mask, sign, weight_decay, DECAYED)
            if KEPT:
                whole = g
                if AHEAD:
                    whole_param = load(param, at, mask)  # on its way while the squares are summed
            squares += g * g
        sums = tl.sum(squares, axis=1)
        means = sums * number(layer, OF_COLUMN)
        if LEAVE_OUT:
            # A finite sum has finite terms only. One that is not may just have overflowed.
            if tl.max((present & ((sums < float("inf")) == 0)).to(tl.int32), axis=0) != 0:
                bad = bad_rows(grad, i, present, columns, TILE_ROWS, TILE_COLUMNS)
                good = present & (bad == 0)
                tl.atomic_add(left_out, tl.sum((present & bad).to(tl.int32), axis=0).to(tl.int64))
    elif LEAVE_OUT and BY_ROWS:
        bad = bad_rows(grad, i, present, columns, TILE_ROWS, TILE_COLUMNS)
        good = present & (bad == 0)
        count = tl.sum((present & bad).to(tl.int32), axis=0).to(tl.int64)
        if count != 0:
            tl.atomic_add(left_out, count)
    if SECOND_KIND == SM3 or (HELD and SECOND_KIND != ROW_SKETCH):
        stored = load(second, row, good)
    elif SECOND_KIND == ROW or SECOND_KIND == FACTORED:
        stored = load(second, row, good) + means * second_weight
        tl.debug_barrier()  # fewer rows than threads: several read the same one, and all are to have read the old value
        tl.store(second + row, stored, mask=good)
    if SECOND_KIND == FACTORED:
        stored += tl.load(shape + columns)  # the floor
    of_row = (stored * second_scale)[:, None]
    if SECOND_KIND == ROW_SKETCH:
        only = tl.zeros([1], tl.int64)
        of_row = estimate(
            second, row_id, only, good[:, None], 1, second_width, second_seed, second_scale, SECOND_DEPTH, False
        )
    row_largest = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    bad_elements = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.int32)

    for start in range(begin, end, TILE_COLUMNS):
        column = start + lane
        inside = column < columns
        if CODED:
            inside = inside_row(start, columns, ALIGNED, TILE_COLUMNS)
        column_id = (column + column_offset).to(tl.uint64)
        mask = good[:, None] & inside[None, :]
        at_grad = (i * columns + start)[:, None] + lane[None, :]
        at = (row * columns + start)[:, None] + lane[None, :]
        # Elements are written back, not masked: a mask that changes from one to the next would leave nothing to be read
        # or written 16 bytes at a time.
        stays = mask
        if BY_ELEMENTS:
            stays = not_finite_bits(grad, at_grad, mask)
            bad_elements -= stays
        before = row_largest
        if CODED:
            before = load(param, at, mask)  # all is read before anything is stored: no load waits for another
        first_before, first_columns = codes_before(
            first_codes,
            first_absmax,
            first_hashes,
            row,
            start,
            columns,
            good,
            first_decay,
            FIRST_KIND,
            FIRST_DEPTH,
            FIRST_BLOCK,
            True,
            ALIGNED,
            TILE_ROWS,
            TILE_COLUMNS,
        )
        second_before, second_columns = codes_before(
            second_codes,
            second_absmax,
            second_hashes,
            row,
            start,
            columns,
            good,
            second_decay,
            SECOND_KIND,
            SECOND_DEPTH,
            SECOND_BLOCK,
            False,
            ALIGNED,
            TILE_ROWS,
            TILE_COLUMNS,
        )
        if KEPT:
            g = whole
        else:
            g = gradient(grad, param, at_grad, at, mask, sign, weight_decay, DECAYED)

        m = g
        if FIRST_KIND == SKETCH:
            m = estimate(first, row_id, column, mask, columns, first_width, first_seed, first_scale, FIRST_DEPTH, True)
        elif FIRST_KIND == QUANTIZED:
            m = first_before + g * first_weight
            encode(
                first_codes,
                first_absmax,
                row,
                start,
                columns,
                good,
                m,
                first_noise,
                first_columns,
                FIRST_DEPTH,
                FIRST_BLOCK,
                True,
                ALIGNED,
                TILE_ROWS,
                TILE_COLUMNS,
            )
        elif FIRST_KIND != NONE:
            m = advance(
                first,
                at,
                mask,
                stays,
                g,
                row_id,
                column_id,
                first_decay,
                first_weight,
                first_scale,
                first_seed,
                FIRST_KIND,
                BY_ELEMENTS,
            )

        if SECOND_KIND == NONE:
            update = m
            if NESTEROV_USED:
                update = g + m * nesterov
        else:
            if SECOND_KIND == ROW or SECOND_KIND == ROW_SKETCH:
                v = of_row
            elif SECOND_KIND == SM3:
                v = of_row
                if COLUMNS_USED:
                    # Read here, not before: a register more would be spilled.
                    kept = load(held, column, inside) * number(layer, SECOND + COLUMN_WEIGHT)
                    other = tl.broadcast_to(kept[None, :], g.shape)
                    v = lesser(tl.broadcast_to(v, g.shape), other)
                # Beyond the tensor v is 0, as it is nowhere less.
                v = tl.where(mask, v + g * g * second_weight, 0.0)
                row_largest = greater(row_largest, v)
                if COLUMNS_USED:
                    # Integers order non-negative floats, NaN last; a maximum does not depend on the order of programs.
                    bits = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
                    # Few programs find a larger one than those before them; what is read late costs an atomic only.
                    known = tl.load(largest + column, mask=inside, other=0, cache_modifier=".cg")
                    tl.atomic_max(largest + column, bits, mask=inside & (bits > known))
            elif SECOND_KIND == FACTORED:
                v = of_row * load(shape, column, inside)[None, :]
            elif SECOND_KIND == SKETCH:
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
            elif SECOND_KIND == QUANTIZED:
                v = second_before + (g * g) * second_weight
                v = tl.where(mask, v, 0.0)  # beyond the columns, too, codes mean something else
                encode(
                    second_codes,
                    second_absmax,
                    row,
                    start,
                    columns,
                    good,
                    v,
                    second_noise,
                    second_columns,
                    SECOND_DEPTH,
                    SECOND_BLOCK,
                    False,
                    ALIGNED,
                    TILE_ROWS,
                    TILE_COLUMNS,
                )
            else:
                v = advance(
                    second,
                    at,
                    mask,
                    stays,
                    g * g,
                    row_id,
                    column_id,
                    second_decay,
                    second_weight,
                    second_scale,
                    second_seed,
                    SECOND_KIND,
                    BY_ELEMENTS,
                )
            update = _preconditioned(m, v, eps, correction, bound, BOUNDED, CODED)

        if MOMENTUM_KIND != NONE:
            update = advance(
                momentum,
                at,
                mask,
                stays,
                update,
                row_id,
                column_id,
                momentum_decay,
                momentum_weight,
                momentum_scale,
                momentum_seed,
                MOMENTUM_KIND,
                BY_ELEMENTS,
            )
        if AHEAD:
            before = whole_param
        elif not CODED:
            before = load(param, at, mask)
        new = before * decay_factor - update * lr
        if BY_ELEMENTS:
            new = chosen(stays, before, new)
        store(param, at, new, mask)

    if SECOND_KIND == SM3:
        bits = row_largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        most = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        tl.debug_barrier()  # as above
        tl.store(second + row, most * number(layer, OF_SCALE), mask=good)
    if BY_ELEMENTS:
        count = tl.sum(tl.sum(bad_elements, axis=0), axis=0).to(tl.int64)
        if count != 0:
            tl.atomic_add(left_out, count)
