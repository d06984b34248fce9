"""The kernels that make the table of a step on the device, of recipes and of what lies there."""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.schema import MIN_SCALE
from lightning_sketch.kernels.triton.jit import inlined, kernel
from lightning_sketch.kernels.triton.recipes import NAMES, STATE_NAMES
from lightning_sketch.kernels.triton.table import (
    ALL_ROWS,
    COLUMN_WEIGHT,
    CORRECTION,
    COUNT,
    DECAY,
    DECAY_FACTOR,
    EPS,
    EXPONENTS,
    FIRST,
    GRAD,
    LARGEST,
    LEFT_OUT,
    LR,
    MOMENTUM,
    OF_SCALE,
    ROWS,
    SCALE,
    SCRATCH_WORDS,
    SECOND,
    SEED,
    SIGN,
    STATE_COLUMNS,
    SUMS,
    WEIGHT,
    WORDS,
)

RECIPE = tl.constexpr(len(NAMES))
LANES = tl.constexpr(1 << (COUNT - 1).bit_length())
_STEP, _AMP, _RATES = (tl.constexpr(NAMES.index(name)) for name in ("step", "amp", "lr_at"))
_OF_STATES = tl.constexpr(NAMES.index("second_scale_at"))
_STATE_WORDS = tl.constexpr(len(STATE_NAMES))
_SCALE_AT, _DECAY, _WEIGHT_AT, _WEIGHT, _COLUMN_WEIGHT, _DIVIDED, _COUNTED, _NUMEL, _COLUMN_NUMEL = map(
    tl.constexpr, range(len(STATE_NAMES))
)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
#: Addresses that one launch writes.
ADDRESSES = 16


@inlined
def _float64(word: tl.tensor) -> tl.tensor:
    return word.to(tl.float64, bitcast=True)


@inlined
def _with(row: tl.tensor, lane: tl.tensor, WORD: tl.constexpr, x: tl.tensor) -> tl.tensor:
    """The words with a float64 as the float32 of one of them."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(lane == WORD, bits, row)


@inlined
def _number(values: tl.tensor, recipe: tl.tensor) -> tl.tensor:
    """A number by its two words of a recipe, float64."""
    at = tl.load(recipe)
    return tl.load(values + at, mask=at >= 0, other=0.0) + _float64(tl.load(recipe + 1))


@inlined
def _scale(recipe: tl.tensor) -> tl.tensor:
    """The scale of a state as the last step left it, float64; 1 if it has none."""
    address = tl.load(recipe + _SCALE_AT)
    return tl.load(address.to(tl.pointer_type(tl.float64)), mask=address != 0, other=1.0)


@inlined
def _write_state(
    row: tl.tensor,
    lane: tl.tensor,
    recipe: tl.tensor,
    values: tl.tensor,
    step: tl.tensor,
    found: tl.tensor,
    before: tl.tensor,
    is_last: tl.tensor,
    BASE: tl.constexpr,
) -> tl.tensor:
    """The words with the numbers of a state, whose scale decays.

    Args:
        before: the scale.
        is_last: whether all programs of the layer have read the scale, and this one writes it.
        BASE: the first of its words.
    """
    address = tl.load(recipe + _SCALE_AT)
    has_scale = address != 0
    decay = _float64(tl.load(recipe + _DECAY))
    after = before * decay
    decays = has_scale & (found == 0)
    scale = tl.where(decays, tl.where(after < _MIN_SCALE, 1.0, after), before)
    tl.store(address.to(tl.pointer_type(tl.float64)), scale, mask=has_scale & is_last)
    divisor = tl.where(tl.load(recipe + _DIVIDED) != 0, scale, 1.0)
    weight = _number(values, recipe + _WEIGHT_AT) / divisor
    column_weight = _float64(tl.load(recipe + _COLUMN_WEIGHT)) / divisor
    column_weight = tl.where(found == 0, column_weight, 1.0)  # SM3's factor
    row = _with(row, lane, BASE + DECAY, tl.where(has_scale, 1.0, decay))
    row = _with(row, lane, BASE + WEIGHT, weight)
    row = _with(row, lane, BASE + COLUMN_WEIGHT, column_weight)
    row = _with(row, lane, BASE + SCALE, scale)
    if BASE == SECOND:
        row = _with(row, lane, OF_SCALE, 1.0 / scale)
    counted = tl.load(recipe + _COUNTED) * step.to(tl.int64) * 2
    return tl.where(lane == BASE + SEED, row + counted, row)


@inlined
def _renormalize(state: tl.tensor, recipe: tl.tensor, found: tl.tensor, before: tl.tensor, TILE: tl.constexpr) -> None:
    """Multiply this program's share of a state whose scale got small, by its words and its recipe."""
    after = before * _float64(tl.load(recipe + _DECAY))
    if (tl.load(recipe + _SCALE_AT) != 0) & (found == 0) & (after < _MIN_SCALE):
        _multiply(tl.load(state), tl.load(recipe + _NUMEL), after.to(tl.float32), TILE)
        _multiply(tl.load(state + STATE_COLUMNS), tl.load(recipe + _COLUMN_NUMEL), after.to(tl.float32), TILE)


@inlined
def _multiply(address: tl.tensor, numel: tl.tensor, factor: tl.tensor, TILE: tl.constexpr) -> None:
    """This program's share of some numbers times a factor."""
    values = address.to(tl.pointer_type(tl.float32))
    for start in range(tl.program_id(1).to(tl.int64) * TILE, numel, tl.num_programs(1).to(tl.int64) * TILE):
        at = start + tl.arange(0, TILE)
        tl.store(values + at, tl.load(values + at, mask=at < numel, other=0.0) * factor, mask=at < numel)


@kernel("scratch", "zeros", "tickets")
def write_words(
    words: tl.tensor,
    static: tl.tensor,
    recipes: tl.tensor,
    gradients: tl.tensor,
    values: tl.tensor,
    found_inf: tl.tensor,  # float32, 0-d; or None
    grad_scale: tl.tensor,  # likewise
    scratch: tl.int64,
    zeros: tl.int64,
    tickets: tl.int64,
    TILE: tl.constexpr,
) -> None:
    """The words of each layer for this step, by programs ``(layers, shares)``. Scales decay.

    Where one gets small, a layer's programs multiply the state, each a share of it. All of them read the scales, and
    the last one that has read them writes them.
    Where a gradient scaler found what is not finite, a layer has no rows: then nothing changes.

    Args:
        tickets: address of an int32 for each layer, 8 bytes apart, that begins as 0.
    """
    number = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    layer = static + number * WORDS
    row = tl.load(layer + lane, mask=lane < WORDS, other=0)
    recipe = recipes + number * RECIPE
    in_zeros = (lane == LEFT_OUT) | (lane == LARGEST) | (lane == SUMS) | (lane == EXPONENTS)
    in_either = (lane >= LEFT_OUT) & (lane < LEFT_OUT + SCRATCH_WORDS)
    row += tl.where(in_zeros, zeros, tl.where(in_either, scratch, 0))
    row = tl.where(lane == GRAD, tl.load(gradients + number), row)
    step = tl.load(values + tl.load(recipe + _STEP))
    amp = tl.load(recipe + _AMP)
    found = amp * 0
    if found_inf is not None:
        found = tl.where((amp != 0) & (tl.load(found_inf) == 1.0), 1, 0).to(tl.int64)
    row = tl.where(((lane == ROWS) | (lane == ALL_ROWS)) & (found != 0), 0, row)
    if grad_scale is not None:
        scale = tl.zeros([LANES], tl.float32) + tl.load(grad_scale).to(tl.float32)
        signs = tl.div_rn(row.to(tl.int32).to(tl.float32, bitcast=True), scale)
        row = tl.where((lane == SIGN) & (amp != 0), signs.to(tl.int32, bitcast=True).to(tl.int64), row)
    row = _with(row, lane, LR, _number(values, recipe + _RATES))
    row = _with(row, lane, DECAY_FACTOR, _number(values, recipe + _RATES + 2))
    row = _with(row, lane, EPS, _number(values, recipe + _RATES + 4))
    row = _with(row, lane, CORRECTION, _number(values, recipe + _RATES + 6))
    second = recipe + _OF_STATES
    first, momentum = second + _STATE_WORDS, second + 2 * _STATE_WORDS
    of_second, of_first, of_momentum = _scale(second), _scale(first), _scale(momentum)
    tl.debug_barrier()  # all threads have read the scales
    done = tl.atomic_add((tickets + number * 8).to(tl.pointer_type(tl.int32)), 1)
    is_last = done == tl.num_programs(1) - 1
    row = _write_state(row, lane, second, values, step, found, of_second, is_last, SECOND)
    row = _write_state(row, lane, first, values, step, found, of_first, is_last, FIRST)
    row = _write_state(row, lane, momentum, values, step, found, of_momentum, is_last, MOMENTUM)
    if tl.program_id(1) == 0:
        tl.store(words + number * WORDS + lane, row, mask=lane < WORDS)
    _renormalize(layer + SECOND, second, found, of_second, TILE)
    _renormalize(layer + FIRST, first, found, of_first, TILE)
    _renormalize(layer + MOMENTUM, momentum, found, of_momentum, TILE)


@kernel(*(f"a{i}" for i in range(ADDRESSES)))
def put_addresses(
    addresses: tl.tensor,
    a0: tl.int64,
    a1: tl.int64,
    a2: tl.int64,
    a3: tl.int64,
    a4: tl.int64,
    a5: tl.int64,
    a6: tl.int64,
    a7: tl.int64,
    a8: tl.int64,
    a9: tl.int64,
    a10: tl.int64,
    a11: tl.int64,
    a12: tl.int64,
    a13: tl.int64,
    a14: tl.int64,
    a15: tl.int64,
) -> None:
    """Write addresses that a graph keeps."""
    tl.store(addresses, a0)
    tl.store(addresses + 1, a1)
    tl.store(addresses + 2, a2)
    tl.store(addresses + 3, a3)
    tl.store(addresses + 4, a4)
    tl.store(addresses + 5, a5)
    tl.store(addresses + 6, a6)
    tl.store(addresses + 7, a7)
    tl.store(addresses + 8, a8)
    tl.store(addresses + 9, a9)
    tl.store(addresses + 10, a10)
    tl.store(addresses + 11, a11)
    tl.store(addresses + 12, a12)
    tl.store(addresses + 13, a13)
    tl.store(addresses + 14, a14)
    tl.store(addresses + 15, a15)
