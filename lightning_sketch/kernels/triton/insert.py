"""Insertion of whole rows into sketches, sorted by bucket: one lane owns a bucket, and adds its rows in order."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from lightning_sketch.kernels.reference import signed
from lightning_sketch.kernels.schema import FusedStep, Kind, Stored
from lightning_sketch.kernels.triton.bits import bucket_of, gradient, load, row_of
from lightning_sketch.kernels.triton.jit import OPTIONS, kernel
from lightning_sketch.kernels.triton.table import FIRST, ROWS, SECOND, SIGN, WEIGHT, WEIGHT_DECAY, number


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
    means: tl.tensor,  # [rows], NaN of rows that are left out; or None if none are
    layer: tl.tensor,  # the layer's words in the table
    slots: tl.int64,
    columns: tl.tensor,
    column_tiles: tl.int64,
    row_offset: tl.int64,
    level: tl.int64,
    width: tl.int64,
    seed: tl.int64,
    DECAYED: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Add the rows of each slot to its bucket, in the gradient's order: TILE_SLOTS buckets a program.

    A slot has all rows of one bucket, and no other slot has any: nothing is added by two programs.
    """
    column = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS).to(tl.int64)
    slot = (tl.program_id(0) // column_tiles) * TILE_SLOTS + tl.arange(0, TILE_SLOTS).to(tl.int64)
    second_weight, first_weight = number(layer, SECOND + WEIGHT), number(layer, FIRST + WEIGHT)
    sign, weight_decay = number(layer, SIGN), number(layer, WEIGHT_DECAY)
    if tl.load(layer + ROWS) == 0:
        slots = slots * 0  # a step that changes nothing
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
        if means is not None:
            mean = tl.load(means + i, mask=here, other=0.0)
            here = here & (mean == mean)
        row = row_of(ids, i, here)
        mask = here[:, None] & (column < columns)[None, :]
        at = i[:, None] * columns + column[None, :]
        at_param = row[:, None] * columns + column[None, :]
        g = gradient(grad, param, at, at_param, mask, sign, weight_decay, DECAYED)
        if second is not None:
            squares += g * g * second_weight
        if first is not None:
            _, signs = bucket_of((row + row_offset).to(tl.uint64), seed.to(tl.uint64), level, width)
            signed += g * (signs * first_weight)[:, None]
    if second is not None:
        tl.store(second + at_table, squares, mask=used)
    if first is not None:
        tl.store(first + at_table, signed, mask=used)


TILE = 1024  # elements of a tile
TILE_COLUMNS = 128
WAVE = 1 << 20  # rows sorted at once, so that temporaries do not grow with the table


def insert(step: FusedStep, layer: Tensor, means: Tensor | None) -> None:
    """Insert the gradient into all sketches of the step (modified in place).

    Args:
        layer: its words in the table.
        means: float32 ``[k]``, NaN of rows that are left out; ``None`` if none are.
    """
    second, first = step.second, step.first
    sketched_second = second if second is not None and second.kind == Kind.SKETCH else None
    sketched_first = first if first is not None and first.kind == Kind.SKETCH else None
    together = (
        sketched_second is not None
        and sketched_first is not None
        and _hashing(sketched_second) == _hashing(sketched_first)
    )
    for start in range(0, step.grad.shape[0], WAVE):
        wave = _wave(step, start)
        of_wave = means if means is None else means[start : start + WAVE]
        if together:
            _insert_wave(wave, layer, of_wave, sketched_second, sketched_first)
        else:
            if sketched_second is not None:
                _insert_wave(wave, layer, of_wave, sketched_second, None)
            if sketched_first is not None:
                _insert_wave(wave, layer, of_wave, None, sketched_first)


def _wave(step: FusedStep, start: int) -> FusedStep:
    """Some rows of the step."""
    if step.grad.shape[0] <= WAVE:
        return step
    span = slice(start, start + WAVE)
    if step.ids is not None:
        return replace(step, grad=step.grad[span], ids=step.ids[span])
    return replace(step, grad=step.grad[span], param=step.param[span], row_offset=step.row_offset + start)


def _insert_wave(
    step: FusedStep, layer: Tensor, means: Tensor | None, second: Stored | None, first: Stored | None
) -> None:
    """Insert rows, depth by depth."""
    sketch = second or first
    assert sketch is not None
    rows = step.grad.shape[0]
    columns = step.grad.numel() // rows
    tile_columns = min(1 << (columns - 1).bit_length(), TILE_COLUMNS)
    tile_slots = min(256, TILE // tile_columns)
    column_tiles = -(-columns // tile_columns)
    hashing = {"row_offset": step.row_offset, "width": sketch.width, "seed": signed(sketch.seed)}
    for level in range(sketch.depth):
        buckets = torch.empty(rows, dtype=torch.int32, device=step.grad.device)
        hash_rows[(-(-rows // TILE),)](step.ids, buckets, rows=rows, level=level, **hashing, TILE=TILE, **OPTIONS)
        buckets, order = buckets.sort(stable=True)
        begin, end = _slots(buckets, sketch.width)
        insert_rows[(-(-begin.numel() // tile_slots) * column_tiles,)](
            as_bits(step.grad),
            as_bits(step.param),
            step.ids,
            buckets,
            order,
            begin,
            end,
            None if second is None else second.data[level],
            None if first is None else first.data[level],
            means,
            layer,
            slots=begin.numel(),
            columns=columns,
            column_tiles=column_tiles,
            level=level,
            **hashing,
            DECAYED=step.weight_decay != 0,
            TILE_SLOTS=tile_slots,
            TILE_COLUMNS=tile_columns,
            **OPTIONS,
        )


def _slots(buckets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where the rows of each bucket begin and end in the sorted `buckets`, one slot for each bucket or each row.

    With fewer rows than buckets, a slot for each row, of which the first of a bucket has them all; the number of
    buckets that occur would have to come from the device.
    """
    if buckets.numel() >= width:
        edges = torch.searchsorted(buckets, torch.arange(width + 1, dtype=torch.int32, device=buckets.device))
        return edges[:-1], edges[1:].contiguous()
    begin = torch.arange(buckets.numel(), device=buckets.device)
    heads = torch.ones_like(buckets, dtype=torch.bool)
    torch.ne(buckets[1:], buckets[:-1], out=heads[1:])
    return begin, torch.where(heads, torch.searchsorted(buckets, buckets, right=True), begin)


def _hashing(stored: Stored) -> tuple[int, int, int]:
    return stored.depth, stored.width, stored.seed


def as_bits(tensor: Tensor) -> Tensor:
    """The tensor, but bfloat16 as int16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
