"""States in 8 or 4 bits inside kernels; `codecs/quantized.py` is their specification.

Arithmetic, not memory, is what bounds these steps on fast devices, so roundings are made with few instructions. All of
them are exact, or wrong where it makes no difference: the codes are those of the specification, bit for bit.
"""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.bits import mix64, mixed
from lightning_sketch.kernels.triton.jit import QUANTIZED, inlined, kernel
from lightning_sketch.kernels.triton.table import (
    COLUMN_OFFSET,
    COLUMNS,
    FIRST,
    HASH,
    HASHES,
    SECOND,
    SEED,
    find,
)


@kernel("layers")
def hash_columns(
    words: tl.tensor,
    layers: tl.int32,
    HASH_SECOND: tl.constexpr,
    HASH_FIRST: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Hash TILE columns a program, of layers that are not observed; `settle` does it of others."""
    layer, tile = find(words, layers, HASH, SEARCH)
    store_hashes(layer, tile * TILE, HASH_SECOND, HASH_FIRST, TILE)


@inlined
def store_hashes(
    layer: tl.tensor, start: tl.tensor, HASH_SECOND: tl.constexpr, HASH_FIRST: tl.constexpr, TILE: tl.constexpr
) -> None:
    """Store the noise of TILE columns, of each state with codes: all rows share it."""
    column = start + tl.arange(0, TILE)
    inside = column < tl.load(layer + COLUMNS)
    column_id = (column + tl.load(layer + COLUMN_OFFSET)).to(tl.uint64)
    if HASH_SECOND:
        hashes = hash_mixed(column_id, ~tl.load(layer + SECOND + SEED))
        tl.store(hashes_of(layer, 0) + column, hashes.to(tl.int32, bitcast=True), mask=inside)
    if HASH_FIRST:
        hashes = hash_mixed(column_id, ~tl.load(layer + FIRST + SEED))
        tl.store(hashes_of(layer, HASH_SECOND) + column, hashes.to(tl.int32, bitcast=True), mask=inside)


@inlined
def hash_mixed(ids: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """Noise (uint32) of rows by a state's seed, of columns by that inverted; ids are uint64, the seed is int64."""
    return mix64(ids, seed.to(tl.uint64)).to(tl.uint32)


@inlined
def hashes_of(layer: tl.tensor, BEFORE: tl.constexpr) -> tl.tensor:
    """Where `store_hashes` puts hashes (int32), behind those of as many states, at a multiple of 16 bytes."""
    found = tl.load(layer + HASHES).to(tl.pointer_type(tl.int32))
    if BEFORE:
        found += (tl.load(layer + COLUMNS) + 3) // 4 * 4
    return tl.multiple_of(found, 16)


@inlined
def codes_before(
    data: tl.tensor,
    absmax: tl.tensor,
    hashes: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    good: tl.tensor,
    decay: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tuple:
    """What a tile's codes mean, times `decay`, and the noise of its columns, ``[TILE_ROWS, TILE_COLUMNS]``.

    float32 and uint32. Zeros of a state without codes.

    Args:
        hashes: where those of columns are, from `hashes_of`.
        others: as of `_decode`.
    """
    if KIND == QUANTIZED:
        inside = inside_row(start, columns, ALIGNED, TILE_COLUMNS)
        # Of every row anew: as a vector they would be exchanged between threads.
        at = (row * 0)[:, None] + (start + four_each(TILE_COLUMNS))[None, :]
        noise = tl.load(hashes + at, mask=good[:, None] & inside[None, :], other=0).to(tl.uint32, bitcast=True)
        value = _decode(
            data, absmax, row, start, columns, good, decay, BITS, BLOCK, SIGNED, ALIGNED, TILE_ROWS, TILE_COLUMNS
        )
    else:
        noise = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.uint32)
        value = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    return value, noise


@inlined
def _decode(
    data: tl.tensor,
    absmax: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    good: tl.tensor,
    decay: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """What codes of a tile mean, times `decay`, float32 ``[TILE_ROWS, TILE_COLUMNS]``.

    Args:
        data: int64 address of the codes.
        absmax: int64 address of the largest magnitudes.
        row: int64 ``[TILE_ROWS]``.
        start: the tile's first column, which begins a block.
        good: of the rows.
    """
    at, mask = _places(row, start, columns, good, BITS, ALIGNED, TILE_COLUMNS)
    codes = tl.load(_bytes(data, ALIGNED) + at, mask=mask, other=0).to(tl.int32)
    if BITS == 4:
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), [TILE_ROWS, TILE_COLUMNS])
    at, mask = _blocks(row, start, columns, good, BLOCK, TILE_COLUMNS)
    largest = tl.load(absmax.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0) * decay
    SIGN: tl.constexpr = 1 << (BITS - 1)
    if SIGNED:
        c = (codes & (SIGN - 1)).to(tl.float32)
        value = c * c * (1.0 / (SIGN - 1) ** 2) * _over(largest, TILE_ROWS, TILE_COLUMNS)
        negative = (codes & SIGN) << (32 - BITS)
        value = (value.to(tl.int32, bitcast=True) | negative).to(tl.float32, bitcast=True)
    else:
        c = tl.fma(codes.to(tl.float32), 0.5 / SIGN, 0.5 / SIGN)  # exact, as its square
        value = c * c * _over(largest, TILE_ROWS, TILE_COLUMNS)
    return value


@inlined
def encode(
    data: tl.tensor,
    absmax: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    good: tl.tensor,
    value: tl.tensor,
    row_noise: tl.tensor,
    column_noise: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Store a tile as codes, rounded stochastically, and the largest magnitude of every block.

    Args:
        value: float32 ``[TILE_ROWS, TILE_COLUMNS]``, 0 beyond the columns.
        row_noise, column_noise: uint32 ``[TILE_ROWS]`` and ``[TILE_ROWS, TILE_COLUMNS]``.
        others: as of `_decode`.
    """
    SIGN: tl.constexpr = 1 << (BITS - 1)
    SQUARE: tl.constexpr = (SIGN - 1) ** 2 if SIGNED else 4 * SIGN**2
    WIDTH: tl.constexpr = BLOCK if BLOCK < TILE_COLUMNS else TILE_COLUMNS
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF  # these order as integers, what is not finite last
    largest = tl.max(tl.reshape(magnitude, [TILE_ROWS, TILE_COLUMNS // WIDTH, WIDTH]), axis=2)
    finite = largest < 0x7F800000
    usable = finite & (largest >= 0x0D800000)  # 2**-100
    # One that is not finite would leave nothing of the others in its block.
    kept = tl.where(usable, largest, tl.where(finite, 0, 0x7FC00000)).to(tl.float32, bitcast=True)
    _store_largest(absmax, row, start, columns, good, kept, BLOCK, TILE_ROWS, TILE_COLUMNS)
    inverse = tl.where(usable, tl.div_rn(tl.full(kept.shape, 1.0, tl.float32), tl.where(usable, kept, 1.0)), 0.0)
    # Negative, because Triton's minus sign is a subtraction.
    ratio = magnitude.to(tl.float32, bitcast=True) * _over(inverse * (-1.0 * SQUARE), TILE_ROWS, TILE_COLUMNS)
    # What is less would not be rounded up, either. NaN becomes the least: written so, because Triton's interpreter has
    # a minimum of NaN be NaN, as devices have not; they have one instruction for this.
    LEAST: tl.constexpr = -(0.5**20) if SIGNED else -1.0
    ratio = tl.where(ratio < LEAST, ratio, LEAST)
    # The root's integer part c. Where that is one off, at numbers beside squares, the other choice rounds to the same
    # code: noise has 13 bits, coarser than errors of the root. From 1.5 * 2**23 on, floats are integers.
    whole = (tl.sqrt(tl.abs(ratio)) - 0.5) + 12582912.0
    lower = whole - 12582912.0
    # The codes' values are c**2 and (c + 1)**2: up with probability (ratio - c**2) / (2 c + 1). Products and sums are
    # exact but for the last, of which the sign counts: fused they are the same.
    chance = _chance(row_noise[:, None], column_noise)
    beyond = tl.fma(chance, tl.fma(lower, 2.0, 1.0), tl.fma(lower, lower, ratio))
    up = (beyond.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    code = (whole.to(tl.int32, bitcast=True) & 0x1FF) + up
    if SIGNED:
        code |= (code + (SIGN - 1)) & (bits >> (32 - BITS)) & SIGN  # 0 has no sign
    else:
        code -= 1
    if BITS == 4:
        low, high = tl.split(tl.reshape(code, [TILE_ROWS, TILE_COLUMNS // 2, 2]))
        code = low | (high << 4)
    at, mask = _places(row, start, columns, good, BITS, ALIGNED, TILE_COLUMNS)
    tl.store(_bytes(data, ALIGNED) + at, code.to(tl.uint8), mask=mask)


@inlined
def _chance(row: tl.tensor, column: tl.tensor) -> tl.tensor:
    """``(n + 0.5) / 2**13`` of the upper 13 bits n of the noise, made in the mantissa of a float from 1 to 2."""
    bits = ((mixed(row, column) >> 9) & 0x007FFC00) | 0x3F800200
    return bits.to(tl.float32, bitcast=True) - 1.0


@inlined
def _bytes(data: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    found = data.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@inlined
def _places(
    row: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    good: tl.tensor,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tuple:
    """Where the bytes of a tile's codes are, and which of them exist: ``[TILE_ROWS, TILE_COLUMNS * BITS // 8]``."""
    if BITS == 8:
        at = (row * columns + start)[:, None] + four_each(TILE_COLUMNS)[None, :]
        inside = inside_row(start, columns, ALIGNED, TILE_COLUMNS)
    else:
        lane = tl.max_contiguous(tl.arange(0, TILE_COLUMNS // 2), 2)
        if ALIGNED:
            length = columns // 2
        else:
            length = (columns + 1) // 2
        at = (row * length + start // 2)[:, None] + lane[None, :]
        inside = lane < (length - start // 2).to(tl.int32)
    return at, good[:, None] & inside[None, :]


@inlined
def four_each(TILE_COLUMNS: tl.constexpr) -> tl.tensor:
    """Lanes of a tile of which every thread has four side by side, for floats and codes alike: nothing is exchanged."""
    return tl.max_contiguous(tl.arange(0, TILE_COLUMNS), 4)


@inlined
def inside_row(start: tl.tensor, columns: tl.tensor, ALIGNED: tl.constexpr, TILE_COLUMNS: tl.constexpr) -> tl.tensor:
    """Which of a tile's columns exist, in comparisons of 32 bits."""
    lane = tl.arange(0, TILE_COLUMNS)
    if ALIGNED:
        lane = lane // 4 * 4  # one comparison for four
    return lane < (columns - start).to(tl.int32)


@inlined
def _blocks(
    row: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    good: tl.tensor,
    BLOCK: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tuple:
    """Where the largest magnitudes of a tile's blocks are, and which of them exist: ``[TILE_ROWS, blocks]``."""
    COUNT: tl.constexpr = TILE_COLUMNS // BLOCK if BLOCK < TILE_COLUMNS else 1
    blocks = (columns + BLOCK - 1) // BLOCK
    first, lane = start // BLOCK, tl.arange(0, COUNT)
    inside = lane < (blocks - first).to(tl.int32)
    return (row * blocks + first)[:, None] + lane[None, :], good[:, None] & inside[None, :]


@inlined
def _store_largest(
    absmax: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    good: tl.tensor,
    largest: tl.tensor,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Store ``[TILE_ROWS, blocks]``, each by the thread that has its block's first four elements, as it is there."""
    WORDS: tl.constexpr = TILE_COLUMNS // 4
    lane = tl.arange(0, WORDS) * 4
    first = (lane % BLOCK == 0) & (lane < (columns - start).to(tl.int32))
    blocks = (columns + BLOCK - 1) // BLOCK
    at = (row * blocks + start // BLOCK)[:, None] + (lane // BLOCK)[None, :]
    spread = _over(largest, TILE_ROWS, WORDS)
    tl.store(absmax.to(tl.pointer_type(tl.float32)) + at, spread, mask=good[:, None] & first[None, :])


@inlined
def _over(x: tl.tensor, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr) -> tl.tensor:
    """``[TILE_ROWS, blocks]``, each for all of its block."""
    WIDTH: tl.constexpr = TILE_COLUMNS // x.shape[1]
    spread = tl.broadcast_to(tl.expand_dims(x, 2), [TILE_ROWS, x.shape[1], WIDTH])
    return tl.reshape(spread, [TILE_ROWS, TILE_COLUMNS])
