"""How layers are cut into programs: which launches serve them, with which tiles, and what memory those share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightning_sketch.kernels.fields import STATES, Kind
from lightning_sketch.kernels.schema import FusedStep, KernelState

#: Elements of a tile: 8 for each thread of four warps.
TILE = 1024
#: Columns of a tile over wide rows, so that it has several rows: they share the hashes of their columns.
TILE_COLUMNS = 128
#: Bytes of a row's part in tiles that are summed both ways: a whole warp reads 16 bytes a lane.
LINE_BYTES = 512
#: Columns up to which a tile holds whole rows where their means are taken on the way.
WIDEST_ROW = 4096
#: Into how many tiles, one after the other, a program cuts wide rows of quantized states.
QUANTIZED_PARTS = 8
#: Columns of a program that need not have whole rows.
SPAN = 4096
#: Rows of which a program of `observe` leaves one partial sum for each column; fewer where that would be few programs.
OBSERVED_ROWS, FEWER_OBSERVED_ROWS, ENOUGH_PROGRAMS = 64, 32, 1024
#: Columns of a program of `observe`, one warp: what it adds up it never waits for another one for. Some
#: versions of Triton (3.6) would move sums through shared memory between several.
OBSERVED_COLUMNS = 1024
#: Rows of a tile of `observe` at most, where they are narrow.
MOST_OBSERVED = 256
#: Columns up to which `observe` does what `settle` does: one launch less. With more that would take registers.
SETTLED_AT_ONCE = 256
#: Columns of a program of `insert`, and its buckets at most.
INSERTED_COLUMNS, INSERTED_SLOTS = 128, 256
#: Rows, times hash functions, that are sorted at once, so that temporaries do not grow with the table: 28 bytes each.
WAVE = 1 << 21
#: Partial sums of columns that a program of `reduce_columns` adds up.
GROUP = 128
#: Means of rows, and slots of a sketch of row scalars, of a program.
TILE_SKETCH = 256
#: Columns of a program of `finish_sm3`, and of `hash_columns`.
TILE_FINISH = TILE_HASH = 1024

_ELEMENTWISE = (Kind.NONE, Kind.DENSE, Kind.STOCHASTIC, Kind.SCALED)
#: Kinds that know nothing of rows: where a layer has no others, and all rows are present, it is one long row.
_ROWLESS = (Kind.NONE, Kind.DENSE, Kind.SCALED)
#: Kinds of which a program of `apply` must have whole rows.
_OWN_ROWS = {Kind.ROW, Kind.FACTORED, Kind.SM3, Kind.QUANTIZED}

#: Kinds that take sums over rows or columns; and those that may hold the step already.
_SUMMED = (Kind.FACTORED, Kind.ROW_SKETCH)
_HELD = (*_SUMMED, Kind.ROW)

NO_STATE = KernelState(Kind.NONE, torch.empty(0, device="cpu"))


class Key(NamedTuple):
    """What kernels are compiled for. Layers with the same key share launches."""

    second: Kind
    first: Kind
    momentum: Kind
    half: bool
    second_half: bool
    first_half: bool
    momentum_half: bool
    second_depth: int
    first_depth: int
    second_block: int
    first_block: int
    sparse: bool
    columns_used: bool
    leave_out: bool
    decayed: bool
    bounded: bool
    nesterov: bool
    aligned: bool
    at_once: bool
    split: bool
    width: int
    observed_rows: int
    by_bucket: bool
    together: bool
    held: bool

    @property
    def by_rows(self) -> bool:
        """Whether rows are left out, else elements."""
        return not {self.second, self.first, self.momentum} <= {*_ELEMENTWISE}

    @property
    def quantized(self) -> bool:
        """Whether a state is stored as codes; its depth is then the number of their bits."""
        return self.second_block + self.first_block > 0

    @property
    def inserts(self) -> bool:
        """Whether whole rows are inserted into sketches."""
        return Kind.SKETCH in (self.second, self.first)

    @property
    def observed(self) -> bool:
        """Whether the gradient is looked at before anything changes."""
        return self.summed is not Kind.NONE or (self.leave_out and self.inserts)

    @property
    def summed(self) -> Kind:
        """The kind of the second state if it takes sums over rows or columns in this step, else NONE."""
        return self.second if self.second in _SUMMED and not self.held else Kind.NONE

    @property
    def observe_tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of `observe`."""
        return _observe_tile(self.width)

    @property
    def block_rows(self) -> int:
        """Rows of a program of `observe`."""
        return max(self.observed_rows, self.observe_tile[0])

    @property
    def one_chunk(self) -> bool:
        """Whether a program of `observe` has whole rows, and settles them, too."""
        return self.at_once and self.width <= min(SETTLED_AT_ONCE, self.observe_tile[1])

    @property
    def observe_warps(self) -> int:
        """Warps of a program of `observe`: one, but where that would take too many registers.

        So it is where it also settles, and where elements are loaded one by one, with an address and a mask each.
        """
        return 8 if self.one_chunk else 1 if self.aligned else 4

    @property
    def insertions(self) -> list[tuple[bool, bool, int]]:
        """Launches of `insert`: into which of second and first state, and how many hash functions they have."""
        if self.together:
            return [(True, True, self.second_depth)]
        second, first = self.second == Kind.SKETCH, self.first == Kind.SKETCH
        return [(True, False, self.second_depth)] * second + [(False, True, self.first_depth)] * first

    @property
    def insert_tile(self) -> tuple[int, int]:
        """Buckets and columns of a program of `insert`."""
        columns = min(self.width, INSERTED_COLUMNS)
        return min(INSERTED_SLOTS, TILE // columns), columns

    @property
    def apply_tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of `apply`."""
        tile, columns = TILE, min(self.width, TILE_COLUMNS)
        if self.quantized:  # what is encoded takes registers; beside SM3 there are more warps
            tile = tile if self.second == Kind.SM3 else tile // 2
        elif max(self.second_depth, self.first_depth) > 4:
            tile //= 2  # a median of many takes registers
        if self.second == Kind.ROW and not (self.observed or self.held):
            columns = min(self.width, WIDEST_ROW)
        elif self.second == Kind.SM3:
            columns = min(self.width, LINE_BYTES // 4)
            tile = tile if self.quantized else tile // 2
        elif self.rowless:
            columns = min(self.width, TILE)
        elif self.quantized:
            # Few of the wider rows at a time: they are looked through first, and should still be in a cache after.
            columns = max(columns, min(self.width // QUANTIZED_PARTS, tile))
        if self.quantized:  # whole blocks, and four lanes for a thread
            columns = max(columns, min(self.width, max(self.second_block, self.first_block)), 4)
        return max(1, tile // columns), columns

    @property
    def apply_warps(self) -> int:
        """Warps of a program of `apply`."""
        rows, columns = self.apply_tile
        apart = 1 if self.aligned else 2  # elements that are loaded one by one take an address and a mask each
        if self.second == Kind.SM3:
            # One warp finds maxima both ways without waiting for others; beside a first moment that takes too many
            # registers.
            return 8 if self.quantized else apart if self.first == Kind.NONE else 2 * apart
        # Whole rows lie in registers twice, gradient and parameter, and so do codes.
        in_one = 256 if self.second == Kind.ROW or self.quantized else 512
        return min(16, max(4 * apart, apart * rows * columns // in_one))

    @property
    def rowless(self) -> bool:
        """Whether a layer is one long row."""
        return _is_rowless(self.sparse, self.second, self.first, self.momentum)


@dataclass(slots=True)
class Laid:
    """One step of one layer, cut into programs.

    Args:
        key: what its kernels are compiled for.
        rows, columns: of the gradient, as kernels see it.
        programs: numbers of programs, in the order of `table.PROGRAMS`; of `hash_rows` those of a step that sorts rows.
        blocks: of rows, each with a partial sum for every column.
        splits: programs of `apply` for the same rows.
        floats: numbers of float32, each padded to 16 bytes: means of rows, sums of rows over chunks of columns, partial
            sums of columns, their groups, the shape of columns and what is added to rows, and (as many words of 32
            bits) hashes of columns.
        sums, exponents: numbers of int64, and of 32 bits, that begin as zeros: of a sketch's slots; of columns' maxima.
    """

    key: Key
    rows: int
    columns: int
    programs: tuple[int, ...]
    blocks: int
    splits: int
    floats: tuple[int, ...]
    sums: int
    exponents: int


def lay_out(step: FusedStep, aligned: bool) -> Laid:
    """Cut a step, whose gradient has elements.

    Args:
        aligned: whether all its tensors begin at multiples of 16 bytes.
    """
    second, first, momentum = step.second or NO_STATE, step.first or NO_STATE, step.momentum or NO_STATE
    for name, kinds in STATES.items():
        stored = getattr(step, name)
        if stored is not None and stored.kind not in kinds:
            raise RuntimeError(f"Triton's kernels refused a step: they do not know a {name} state of {stored.kind!r}")
    rows, sparse = step.grad.shape[0], step.ids is not None
    columns = step.grad.numel() // rows
    if _is_rowless(sparse, second.kind, first.kind, momentum.kind):
        rows, columns = 1, rows * columns
    width = 1 << (min(columns, WIDEST_ROW) - 1).bit_length()
    chunks = ceil(columns, _observe_tile(width)[1])
    sketches = [sketch for sketch in (second, first) if sketch.kind == Kind.SKETCH]
    held = holds_step(step)
    is_summed = second.kind in _SUMMED and not held
    key = Key(
        second.kind,
        first.kind,
        momentum.kind,
        step.param.dtype == torch.bfloat16,
        second.data.dtype == torch.bfloat16,
        first.data.dtype == torch.bfloat16,
        momentum.data.dtype == torch.bfloat16,
        second.depth,
        first.depth,
        _block(second),
        _block(first),
        sparse,
        second.kind == Kind.SM3 and second.columns is not None,
        step.leave_out,
        step.weight_decay != 0,
        step.use_bound,
        step.nesterov != 0,
        aligned and columns % 8 == 0,
        columns <= WIDEST_ROW,
        columns > SPAN and not _OWN_ROWS & {second.kind, first.kind},
        width,
        OBSERVED_ROWS if is_summed and rows * chunks >= OBSERVED_ROWS * ENOUGH_PROGRAMS else FEWER_OBSERVED_ROWS,
        not sparse or any(rows >= sketch.width or rows * sketch.depth > WAVE for sketch in sketches),
        first.kind == second.kind == Kind.SKETCH and hashing(second) == hashing(first),
        held,
    )
    blocks = ceil(rows, key.block_rows) if key.observed else 0
    add = fold = reduce = slots = 0
    means, row_sums = (rows, chunks * rows) if key.observed else (0, 0)
    partials = of_groups = shape = 0
    if held:
        shape = columns + 1 if second.kind == Kind.FACTORED else 0
    elif second.kind == Kind.ROW_SKETCH:
        slots = second.depth * second.width
        add, fold = ceil(rows, TILE_SKETCH), ceil(slots, TILE_SKETCH)
    elif second.kind == Kind.FACTORED:
        groups = ceil(blocks, GROUP)
        reduce = groups * ceil(columns, TILE_COLUMNS)
        partials, of_groups, shape = blocks * columns, groups * columns, columns + 1
    finish = ceil(columns, TILE_FINISH) if key.columns_used else 0
    splits = ceil(columns, SPAN) if key.split else 1
    apply = ceil(rows, key.apply_tile[0]) * splits
    tile_slots, tile_columns = key.insert_tile
    inserted = [
        sketch.depth
        * ceil(sketch.width if key.by_bucket else rows, tile_slots)
        * ceil(columns, tile_columns)
        * (sketch.kind == Kind.SKETCH)
        for sketch in (second, first)
    ]
    hashed = [ceil(rows, TILE_SKETCH) * (sketch.kind == Kind.SKETCH) for sketch in (second, first)]
    settle = 0 if key.one_chunk else blocks
    hash_columns = ceil(columns, TILE_HASH) if key.quantized else 0
    hashes = sum(_padded(columns) for block in (key.second_block, key.first_block) if block)
    floats = means, row_sums, partials, of_groups, shape, hashes
    zeros = columns if key.columns_used else slots
    return Laid(
        key,
        rows,
        columns,
        (blocks * chunks, settle, add, fold, reduce, finish, apply, *hashed, *inserted, hash_columns),
        blocks,
        splits,
        tuple(_padded(size) for size in floats),
        slots,
        zeros,
    )


def holds_step(step: FusedStep) -> bool:
    """Whether the second state holds this step already, as after ranks agreed: then no sums are made."""
    second = step.second
    if second is None or step.on_device is not None:
        return False
    return second.kind in _HELD and bool(second.weight == 0)


def _observe_tile(width: int) -> tuple[int, int]:
    columns = min(width, OBSERVED_COLUMNS)
    return min(MOST_OBSERVED, OBSERVED_COLUMNS // columns), columns


def hashing(sketch: KernelState) -> tuple[int, int, int]:
    """What the bucket of a row depends on."""
    return sketch.depth, sketch.width, sketch.seed


def _block(state: KernelState) -> int:
    return state.width if state.kind == Kind.QUANTIZED else 0


def _padded(size: int) -> int:
    return size + -size % 4


def _is_rowless(sparse: bool, *kinds: Kind) -> bool:
    return not sparse and all(kind in _ROWLESS for kind in kinds)


def ceil(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
