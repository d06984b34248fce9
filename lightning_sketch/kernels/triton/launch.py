"""One fused step as a sequence of kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.kernels.fused import FusedStep, Kind, Stored
from lightning_sketch.kernels.triton.apply import apply
from lightning_sketch.kernels.triton.insert import hash_rows, insert_rows
from lightning_sketch.kernels.triton.reduce import sum_squares

TILE = 1024  # elements of a tile: 8 for each thread of four warps
TILE_COLUMNS = 128  # of a tile over wide rows, so that it has several: they share the hashes of their columns
TILE_SM3 = 512  # elements where maxima are taken both ways: at 1024 the registers are too few
WIDEST_ROW = 8192  # columns up to which one program takes whole rows, and so reads the gradient once for row means
FEW_ROWS = 128  # rows that are too few to keep a device busy with a program each
PROGRAMS = 1024  # keep a device busy; beyond, a program takes several tiles of rows
CHUNKS = 4096  # chunks of rows at most, each of which leaves a partial result for every column
WAVE = 1 << 20  # rows sorted at once, so that temporaries do not grow with the table

#: Kinds that know of rows: where a layer has none of them, and all rows are present, it is one long row.
_ROW_KINDS = {Kind.STOCHASTIC, Kind.ROW, Kind.ROW_SKETCH, Kind.SM3, Kind.FACTORED, Kind.SKETCH}

_NO_STATE = Stored(Kind.NONE, torch.empty(0))
#: As little fusing of multiplications and additions as in the reference; memory is what takes time.
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def perform(step: FusedStep) -> None:
    """Perform one step (its parameter and states modified in place)."""
    if step.grad.numel() == 0:
        return
    device = step.param.device
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        _perform(_flat(step))


def _perform(step: FusedStep) -> None:
    second, rows = step.second, step.grad.shape[0]
    columns = step.grad.numel() // rows
    kind = Kind.NONE if second is None else second.kind
    shape: Tensor | None = None
    whole_rows = kind == Kind.ROW and columns <= WIDEST_ROW and (rows >= FEW_ROWS or columns <= TILE)
    if kind == Kind.FACTORED:
        shape = _add_factors(step)
    elif kind == Kind.ROW and not whole_rows:
        assert second is not None
        means, _ = _square_sums(step, with_columns=False)
        _add_to_rows(second.data, step.ids, means.div_(columns).mul_(second.weight))
    _insert(step)
    _apply(step, shape, whole_rows)


def _flat(step: FusedStep) -> FusedStep:
    """The step, or as one long row if only elements count."""
    states = [state for state in (step.second, step.first, step.momentum) if state is not None]
    if step.ids is not None or any(state.kind in _ROW_KINDS for state in states):
        return step

    def line(state: Stored | None) -> Stored | None:
        return None if state is None else replace(state, data=state.data.view(1, -1))

    return replace(
        step,
        param=step.param.view(1, -1),
        grad=step.grad.view(1, -1),
        second=line(step.second),
        first=line(step.first),
        momentum=line(step.momentum),
    )


@dataclass(frozen=True)
class _Tiling:
    """How a matrix is cut: tiles of rows times columns, and some tiles of rows to a program."""

    tile_rows: int
    tile_columns: int
    column_tiles: int
    groups: int
    chunks: int

    @classmethod
    def of(cls, rows: int, columns: int, *, tile: int, whole_rows: bool = False) -> _Tiling:
        width = _power_of_2(columns)
        if whole_rows or width <= TILE_COLUMNS:
            tile_rows, tile_columns = max(1, tile // width), width
        else:
            tile_rows = min(tile // TILE_COLUMNS, _power_of_2(rows))
            tile_columns = min(width, tile // tile_rows)
        column_tiles = _ceil(columns, tile_columns)
        row_tiles = _ceil(rows, tile_rows)
        # Several tiles a program where there are programs enough, for fewer partial results.
        groups = max(1, min(8, row_tiles * column_tiles // PROGRAMS), _ceil(row_tiles, CHUNKS))
        if whole_rows:
            groups = 1  # leaves no partial results
        return cls(tile_rows, tile_columns, column_tiles, groups, _ceil(row_tiles, groups))

    @property
    def grid(self) -> tuple[int]:
        return (self.chunks * self.column_tiles,)

    @property
    def options(self) -> dict[str, Any]:
        """Compile-time arguments."""
        warps = min(16, max(4, self.tile_rows * self.tile_columns // 512))
        return {"TILE_ROWS": self.tile_rows, "TILE_COLUMNS": self.tile_columns, **_OPTIONS, "num_warps": warps}


def _square_sums(step: FusedStep, *, with_columns: bool) -> tuple[Tensor, Tensor | None]:
    """Sums of squares of the gradient's rows ``[k]`` and columns ``[columns]``, float32."""
    rows = step.grad.shape[0]
    columns = step.grad.numel() // rows
    tiling = _Tiling.of(rows, columns, tile=TILE)
    of_rows = _empty(step, rows, tiling.column_tiles)
    of_columns = _empty(step, tiling.chunks, columns) if with_columns else None
    sum_squares[tiling.grid](
        as_bits(step.grad),
        as_bits(step.param),
        step.ids,
        of_rows,
        of_columns,
        rows=rows,
        columns=columns,
        column_tiles=tiling.column_tiles,
        groups=tiling.groups,
        **_of_gradient(step),
        **tiling.options,
    )
    return of_rows.sum(dim=1), None if of_columns is None else of_columns.sum(dim=0)


def _add_factors(step: FusedStep) -> Tensor:
    """Add to row and column means; returns the columns divided by their mean, ``[columns]``."""
    second = step.second
    assert second is not None
    assert second.columns is not None
    rows, columns = _square_sums(step, with_columns=True)
    assert columns is not None
    _add_to_rows(second.data, step.ids, rows.div_(columns.numel()).mul_(second.weight))
    held = second.columns.view(-1)
    held.add_(columns, alpha=second.column_weight)
    return (held / held.mean()).nan_to_num_(nan=0.0)  # 0/0 := 0 before the first gradient


def _add_to_rows(vector: Tensor, ids: Tensor | None, values: Tensor) -> None:
    # Not index_add_: it is atomic on CUDA. Ids occur once.
    _set_rows(vector, ids, values.add_(vector if ids is None else vector.index_select(0, ids)))


def _set_rows(vector: Tensor, ids: Tensor | None, values: Tensor) -> None:
    if ids is None:
        vector.copy_(values)
    else:
        vector.index_copy_(0, ids, values)


def _insert(step: FusedStep) -> None:
    """Insert the gradient into all sketches of the step."""
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
        if second is not None and second.kind == Kind.ROW_SKETCH:
            means, _ = _square_sums(wave, with_columns=False)
            means.div_(step.grad.numel() // step.grad.shape[0])
            _insert_wave(wave, means[:, None], second, None)
        if together:
            _insert_wave(wave, None, sketched_second, sketched_first)
        else:
            if sketched_second is not None:
                _insert_wave(wave, None, sketched_second, None)
            if sketched_first is not None:
                _insert_wave(wave, None, None, sketched_first)


def _wave(step: FusedStep, start: int) -> FusedStep:
    """Some rows of the step."""
    if step.grad.shape[0] <= WAVE:
        return step
    span = slice(start, start + WAVE)
    if step.ids is not None:
        return replace(step, grad=step.grad[span], ids=step.ids[span])
    return replace(step, grad=step.grad[span], param=step.param[span], row_offset=step.row_offset + start)


def _insert_wave(step: FusedStep, means: Tensor | None, second: Stored | None, first: Stored | None) -> None:
    """Insert rows, or their means ``[k, 1]``, depth by depth."""
    sketch = second or first
    assert sketch is not None
    values = step.grad if means is None else means
    rows = values.shape[0]
    columns = values.numel() // rows
    tile_columns = min(_power_of_2(columns), TILE_COLUMNS)
    tile_slots = min(256, TILE // tile_columns)
    column_tiles = _ceil(columns, tile_columns)
    hashing = {"row_offset": step.row_offset, "width": sketch.width, "seed": signed(sketch.seed)}
    for level in range(sketch.depth):
        buckets = torch.empty(rows, dtype=torch.int32, device=step.grad.device)
        hash_rows[(_ceil(rows, TILE),)](step.ids, buckets, rows=rows, level=level, **hashing, TILE=TILE, **_OPTIONS)
        buckets, order = buckets.sort(stable=True)
        begin, end = _slots(buckets, sketch.width)
        insert_rows[(_ceil(begin.numel(), tile_slots) * column_tiles,)](
            as_bits(values),
            as_bits(step.param),
            step.ids,
            buckets,
            order,
            begin,
            end,
            None if second is None else second.data[level],
            None if first is None else first.data[level],
            slots=begin.numel(),
            columns=columns,
            column_tiles=column_tiles,
            level=level,
            **hashing,
            second_weight=0.0 if second is None else second.weight,
            first_weight=0.0 if first is None else first.weight,
            **(_of_gradient(step) if means is None else {"sign": 1.0, "weight_decay": 0.0, "DECAYED": False}),
            SQUARED=means is not None,
            TILE_SLOTS=tile_slots,
            TILE_COLUMNS=tile_columns,
            **_OPTIONS,
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


def _apply(step: FusedStep, shape: Tensor | None, whole_rows: bool) -> None:
    second, first, momentum = (state or _NO_STATE for state in (step.second, step.first, step.momentum))
    rows = step.grad.shape[0]
    columns = step.grad.numel() // rows
    columns_of = None if second.columns is None else second.columns.view(-1)
    sm3 = second.kind == Kind.SM3
    tiling = _Tiling.of(rows, columns, tile=TILE_SM3 if sm3 else TILE, whole_rows=whole_rows)
    row_largest = _empty(step, rows, tiling.column_tiles) if sm3 else None
    column_largest = _empty(step, tiling.chunks, columns) if sm3 and columns_of is not None else None
    apply[tiling.grid](
        as_bits(step.param),
        as_bits(step.grad),
        step.ids,
        _data(second),
        columns_of if sm3 else shape,
        _data(first),
        _data(momentum),
        row_largest,
        column_largest,
        rows=rows,
        columns=columns,
        column_tiles=tiling.column_tiles,
        groups=tiling.groups,
        row_offset=step.row_offset,
        column_offset=step.column_offset,
        second_decay=second.decay,
        second_weight=second.weight,
        second_scale=second.scale,
        second_width=second.width,
        second_seed=signed(second.seed),
        first_decay=first.decay,
        first_weight=first.weight,
        first_scale=first.scale,
        first_width=first.width,
        first_seed=signed(first.seed),
        momentum_decay=momentum.decay,
        momentum_weight=momentum.weight,
        momentum_scale=momentum.scale,
        momentum_seed=signed(momentum.seed),
        **_of_gradient(step),
        shrink=step.shrink,
        lr=step.lr,
        eps=step.eps,
        correction=step.correction,
        bound=step.bound or 0.0,
        nesterov=step.nesterov,
        SECOND=int(second.kind),
        FIRST=int(first.kind),
        MOMENTUM=int(momentum.kind),
        SECOND_DEPTH=second.depth,
        FIRST_DEPTH=first.depth,
        BOUNDED=step.bound is not None,
        NESTEROV=step.nesterov != 0,
        WHOLE_ROWS=whole_rows,
        **tiling.options,
    )
    if row_largest is not None:
        _set_rows(second.data, step.ids, row_largest.amax(dim=1).div_(second.scale))
    if column_largest is not None and columns_of is not None:
        largest = column_largest.amax(dim=0)
        # With every row present the maximum is assigned (so it can fall); absent rows are bounded by the old value.
        columns_of.copy_(largest if rows == step.param.shape[0] else torch.maximum(columns_of, largest))


def _of_gradient(step: FusedStep) -> dict[str, Any]:
    """The kernels' arguments about `FusedStep.grad`."""
    return {
        "sign": -1.0 if step.negate else 1.0,
        "weight_decay": step.weight_decay,
        "DECAYED": step.weight_decay != 0,
    }


def _data(stored: Stored) -> Tensor | None:
    return None if stored.kind == Kind.NONE else as_bits(stored.data)


def as_bits(tensor: Tensor) -> Tensor:
    """The tensor, but bfloat16 as int16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def signed(seed: int) -> int:
    """The 64-bit two's complement."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def _hashing(stored: Stored) -> tuple[int, int, int]:
    return stored.depth, stored.width, stored.seed


def _empty(step: FusedStep, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=step.grad.device)


def _power_of_2(number: int) -> int:
    """The smallest power of two not below."""
    return 1 << (number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
