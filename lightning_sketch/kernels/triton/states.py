"""States inside kernels: the next value of one shaped like the parameter, and what a sketch says."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import (
    bucket_of,
    chosen,
    greater,
    lesser,
    load,
    mix64,
    narrow_stochastically,
    noise16,
    store,
    widen,
)
from lightning_sketch.kernels.triton.jit import SCALED, STOCHASTIC, inlined


@inlined
def advance(
    data: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    stays: tl.tensor,
    x: tl.tensor,
    row_id: tl.tensor,
    column_id: tl.tensor,
    decay: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    seed: tl.tensor,
    KIND: tl.constexpr,
    BY_ELEMENTS: tl.constexpr,
) -> tl.tensor:
    """``s <- decay * s + weight * x`` of a tile of a state shaped like the parameter; returns what it then means.

    Args:
        stays: with BY_ELEMENTS, -1 where an element is to stay what it is, int32.
        row_id, column_id: uint64 ``[TILE_ROWS]`` and ``[TILE_COLUMNS]``, in the whole parameter.
    """
    if KIND == SCALED:
        s = store(data, at, _unless(stays, load(data, at, mask), x * weight, 1.0, BY_ELEMENTS), mask) * scale
    elif KIND == STOCHASTIC:
        rows = mix64(row_id, seed.to(tl.uint64)).to(tl.uint32)
        # Inverted while it is signed: the interpreter of Triton 3.7 cannot invert unsigned numbers.
        columns = mix64(column_id, (~seed.to(tl.int64)).to(tl.uint64)).to(tl.uint32)
        before = tl.load(data + at, mask=mask, other=0)
        exact = widen(before) * decay + x * weight
        half = narrow_stochastically(exact, noise16(rows[:, None], columns[None, :]))
        if BY_ELEMENTS:
            half = chosen(stays, before, half)
        tl.store(data + at, half, mask=mask)
        s = widen(half)
    else:
        s = store(data, at, _unless(stays, load(data, at, mask), x * weight, decay, BY_ELEMENTS), mask)
    return s


@inlined
def _unless(
    stays: tl.tensor, old: tl.tensor, added: tl.tensor, decay: tl.tensor, BY_ELEMENTS: tl.constexpr
) -> tl.tensor:
    """``old * decay + added``, or `old` where it stays."""
    new = old * decay + added
    return chosen(stays, old, new) if BY_ELEMENTS else new


@inlined
def estimate(
    table: tl.tensor,
    row_id: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    seed: tl.tensor,
    scale: tl.tensor,
    DEPTH: tl.constexpr,
    SIGNED: tl.constexpr,
) -> tl.tensor:
    """What a sketch says of a tile: the median over depth if there are signs, else the minimum.

    Args:
        row_id: uint64 ``[TILE_ROWS]``.
        column: int64 ``[TILE_COLUMNS]``, of the table.
    """
    rows: tl.tuple = ()
    for level in tl.static_range(DEPTH):
        bucket, sign = bucket_of(row_id, seed.to(tl.uint64), level, width)
        at = (bucket + level * width)[:, None] * columns + column[None, :]
        found = tl.load(table + at, mask=mask, other=0.0)
        if SIGNED:
            found = found * sign[:, None]
        rows = rows + (found,)  # noqa: RUF005 - Triton knows no starred expressions
    if SIGNED:
        middle = _median(rows, DEPTH)
    else:
        middle = rows[0]
        for level in tl.static_range(1, DEPTH):
            middle = lesser(middle, rows[level])
    return middle * scale


@inlined
def _median(rows: tl.tuple, DEPTH: tl.constexpr) -> tl.tensor:
    # Bubble the smallest half down.
    for done in tl.static_range(DEPTH // 2 + 1):
        for step in tl.static_range(DEPTH - 1 - done):
            rows = _exchange(rows, DEPTH - 1 - step, DEPTH)
    return rows[DEPTH // 2] if DEPTH % 2 == 1 else (rows[DEPTH // 2 - 1] + rows[DEPTH // 2]) / 2.0


@inlined
def _exchange(rows: tl.tuple, above: tl.constexpr, DEPTH: tl.constexpr) -> tl.tuple:
    """The rows with the lesser of `above` and the one before it first."""
    result: tl.tuple = ()
    for i in tl.static_range(DEPTH):
        if i == above - 1:
            row = lesser(rows[above - 1], rows[above])
        elif i == above:
            row = greater(rows[above - 1], rows[above])
        else:
            row = rows[i]
        result = result + (row,)  # noqa: RUF005 - as above
    return result
