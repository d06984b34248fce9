"""Tables whose numbers the device writes: of steps that can be captured into a graph.

What does not change from step to step lies on the device for good (`Resident`): the words of the layers without their
numbers, and a recipe for each layer, which says where its numbers come from. One kernel makes of both the table of a
step. So a step copies nothing from the host, and a graph that replays it finds the numbers of that replay.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
import triton.language as tl
from torch import Tensor

from lightning_sketch.kernels.capture import capturing
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import MIN_SCALE, FusedStep, KernelState
from lightning_sketch.kernels.triton.jit import OPTIONS, inlined, kernel
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

# Words of a recipe. Of numbers: where they are among the values of a step, or -1; and what they are then, a float64.
NUMBERS_ON_DEVICE = ("lr", "decay_factor", "eps", "correction")
_STATE = ("scale_at", "decay", "weight_at", "weight", "column_weight", "divided", "counted", "numel", "column_numel")
_NAMES = (
    "step",
    "amp",
    *(f"{name}{at}" for name in NUMBERS_ON_DEVICE for at in ("_at", "")),
    *(f"{state}_{name}" for state in ("second", "first", "momentum") for name in _STATE),
)
_FLOATS = {
    *NUMBERS_ON_DEVICE,
    *(f"{s}_{n}" for s in ("second", "first", "momentum") for n in ("decay", "weight", "column_weight")),
}
_numbers = attrgetter(*NUMBERS_ON_DEVICE)
_RECIPE = struct.Struct("<" + "".join("d" if name in _FLOATS else "q" for name in _NAMES))

RECIPE = tl.constexpr(len(_NAMES))
LANES = tl.constexpr(1 << (COUNT - 1).bit_length())
_STEP, _AMP, _RATES = (tl.constexpr(_NAMES.index(name)) for name in ("step", "amp", "lr_at"))
_OF_STATES = tl.constexpr(_NAMES.index("second_scale_at"))
_STATE_WORDS = tl.constexpr(len(_STATE))
_SCALE_AT, _DECAY, _WEIGHT_AT, _WEIGHT, _COLUMN_WEIGHT, _DIVIDED, _COUNTED, _NUMEL, _COLUMN_NUMEL = map(
    tl.constexpr, range(len(_STATE))
)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_ADDRESSES = 16
#: Kinds that are stored divided by a scale, weights too; of SM3 weights are not.
_DIVIDED_KINDS = (Kind.SCALED, Kind.ROW, Kind.ROW_SKETCH, Kind.FACTORED, Kind.SKETCH)
#: Programs that renormalize a state together. It is seldom.
_SHARES, _TILE = 32, 1024


@dataclass
class Resident:
    """What lies on the device from step to step. Nothing there is ever written again: a graph may read it.

    Args:
        host: what was copied there, the gradients' addresses left out.
        addresses: of the gradients.
        static: words of the layers, int64 ``[layers * COUNT]``.
        recipes: int64 ``[layers * RECIPE]``.
        gradients: the addresses, int64.
    """

    host: bytes
    addresses: tuple[int, ...]
    static: Tensor
    recipes: Tensor
    gradients: Tensor


#: What graphs read, which may outlive the optimizers whose steps they replay.
_captured: list[tuple[Tensor, ...]] = []


def device_words(steps: Sequence[FusedStep], words: Sequence[bytes], scratch: Tensor, zeros: Tensor) -> Tensor:
    """The table of a step, int64 ``[layers * COUNT]``; scales are modified in place.

    Args:
        steps: of the layers, in the order of the table, which is not empty.
        words: of the layers, without numbers and the gradients' addresses, and with distances in place of addresses
            in `scratch` and `zeros`.

    Raises:
        RuntimeError: a graph is being captured, and these layers were not stepped outside of one before.
    """
    values = _Values()
    recipes = b"".join(_recipe(step, values) for step in steps)
    held = _resident(steps, b"".join(words), recipes, zeros.device)
    amp = next((step.on_device for step in steps if _scaled(step)), None)
    made = torch.empty_like(held.static)
    factors = torch.empty(3 * len(steps), dtype=torch.float32, device=made.device)
    write_words[(len(steps),)](
        made,
        held.static,
        held.recipes,
        held.gradients,
        torch.stack(values.tensors),
        factors,
        None if amp is None else amp.found_inf,
        None if amp is None else amp.grad_scale,
        scratch=scratch.data_ptr(),
        zeros=zeros.data_ptr(),
        **(OPTIONS | {"num_warps": 1}),  # a scale is read and written by the same
    )
    if any(stored is not None and stored.scale_at is not None for step in steps for stored in _states(step)):
        renormalize[(len(steps), _SHARES)](made, held.recipes, factors, SHARES=_SHARES, TILE=_TILE, **OPTIONS)
    return made


def hold(*tensors: Tensor) -> None:
    """Keep tensors, which a graph that is being captured will read, for as long as the process runs."""
    _captured.append(tensors)


class _Values:
    """Numbers of a step that are known on the device alone, each once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._at: dict[int, int] = {}

    def at(self, value: float | Tensor) -> tuple[int, float]:
        """Where a number is among them, or -1; and what it is if it is known here."""
        if not isinstance(value, Tensor):
            return -1, value
        if id(value) not in self._at:
            self._at[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._at[id(value)], 0.0


def _states(step: FusedStep) -> tuple[KernelState | None, KernelState | None, KernelState | None]:
    return step.second, step.first, step.momentum


def _scaled(step: FusedStep) -> bool:
    """Whether a gradient scaler has a say in a step."""
    device = step.on_device
    return device is not None and (device.found_inf is not None or device.grad_scale is not None)


def _recipe(step: FusedStep, values: _Values) -> bytes:
    assert step.on_device is not None
    numbers: list[float] = [values.at(step.on_device.step)[0], _scaled(step)]
    for number in _numbers(step):
        numbers += values.at(number)
    for stored in _states(step):
        numbers += _NO_STATE if stored is None else _of_state(stored, values)
    return _RECIPE.pack(*numbers)


_NO_STATE: tuple[float, ...] = (0, 0.0, -1, 0.0, 0.0, 0, 0, 0, 0)


def _of_state(stored: KernelState, values: _Values) -> tuple[float, ...]:
    divided = stored.kind in _DIVIDED_KINDS
    columns = stored.columns if stored.kind == Kind.FACTORED else None
    return (
        0 if stored.scale_at is None else stored.scale_at.data_ptr(),
        float(stored.decay) if stored.scale_at is None else stored.scale_decay,
        *values.at(stored.weight),
        float(stored.column_weight),
        divided,
        stored.kind in (Kind.STOCHASTIC, Kind.QUANTIZED),
        0 if stored.scale_at is None else stored.data.numel(),
        0 if columns is None else columns.numel(),
    )


def _resident(steps: Sequence[FusedStep], words: bytes, recipes: bytes, device: torch.device) -> Resident:
    """What lies on the device; copied there if it is not what lies there."""
    addresses = tuple(step.grad.data_ptr() for step in steps)
    cache, host = steps[0].cache, words + recipes
    held: Resident | None = None if cache is None else cache.resident
    if held is None or held.host != host:
        if capturing():
            raise RuntimeError(
                "a graph is captured of a step that was not made before: of other layers, or gradients laid out "
                "otherwise; make a few steps with the same gradients on a side stream first, as torch's documentation "
                "of CUDA graphs says"
            )
        both = _there(host, device)
        split = len(words) // 8
        # By a kernel, which is compiled and loaded then: neither can be done while a graph is captured.
        held = Resident(host, addresses, both[:split], both[split:], _put(addresses, device))
    elif held.addresses != addresses:
        # What the host holds may be gone when a graph is replayed; arguments of launches stay.
        packed = struct.pack(f"<{len(addresses)}q", *addresses)
        gradients = _put(addresses, device) if capturing() else _there(packed, device)
        held = Resident(host, addresses, held.static, held.recipes, gradients)
    if capturing():
        _captured.append((held.static, held.recipes, held.gradients))
    elif cache is not None:
        cache.resident = held
    return held


def _put(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses, and some zeros, in a tensor that launches write."""
    padded = addresses + (0,) * (-len(addresses) % _ADDRESSES)
    held = torch.empty(len(padded), dtype=torch.int64, device=device)
    for start in range(0, len(padded), _ADDRESSES):
        put_addresses[(1,)](held[start:], *padded[start : start + _ADDRESSES], **OPTIONS)
    return held


def _there(host: bytes, device: torch.device) -> Tensor:
    words = torch.frombuffer(bytearray(host), dtype=torch.int64)
    # Pinned, so that the copy waits for nothing; torch keeps that memory until the copy is made.
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words


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
def _write_state(
    row: tl.tensor,
    lane: tl.tensor,
    recipe: tl.tensor,
    values: tl.tensor,
    step: tl.tensor,
    found: tl.tensor,
    factor: tl.tensor,
    BASE: tl.constexpr,
) -> tl.tensor:
    """The words with the numbers of a state, whose scale decays.

    Args:
        factor: is set to what its tensors are to be multiplied by, float32.
        BASE: the first of its words.
    """
    address = tl.load(recipe + _SCALE_AT)
    has_scale = address != 0
    at = address.to(tl.pointer_type(tl.float64))
    decay = _float64(tl.load(recipe + _DECAY))
    before = tl.load(at, mask=has_scale, other=1.0)
    after = before * decay
    small = after < _MIN_SCALE
    scale = tl.where(has_scale & (found == 0), tl.where(small, 1.0, after), before)
    tl.store(at, scale, mask=has_scale)
    tl.store(factor, tl.where(has_scale & small & (found == 0), after, 1.0).to(tl.float32))
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


@kernel("scratch", "zeros")
def write_words(
    words: tl.tensor,
    static: tl.tensor,
    recipes: tl.tensor,
    gradients: tl.tensor,
    values: tl.tensor,
    factors: tl.tensor,
    found_inf: tl.tensor,  # float32, 0-d; or None
    grad_scale: tl.tensor,  # likewise
    scratch: tl.int64,
    zeros: tl.int64,
) -> None:
    """A program for each layer: its words for this step. Scales decay.

    Where a gradient scaler found what is not finite, a layer has no rows: then nothing changes.
    """
    number = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    row = tl.load(static + number * WORDS + lane, mask=lane < WORDS, other=0)
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
    of_state = recipe + _OF_STATES
    factor = factors + number * 3
    row = _write_state(row, lane, of_state, values, step, found, factor, SECOND)
    row = _write_state(row, lane, of_state + _STATE_WORDS, values, step, found, factor + 1, FIRST)
    row = _write_state(row, lane, of_state + 2 * _STATE_WORDS, values, step, found, factor + 2, MOMENTUM)
    tl.store(words + number * WORDS + lane, row, mask=lane < WORDS)


@kernel()
def renormalize(
    words: tl.tensor, recipes: tl.tensor, factors: tl.tensor, SHARES: tl.constexpr, TILE: tl.constexpr
) -> None:
    """Multiply the states of a layer whose scale got small: SHARES programs for each layer."""
    number = tl.program_id(0).to(tl.int64)
    layer = words + number * WORDS
    for which in tl.static_range(3):
        factor = tl.load(factors + number * 3 + which)
        if factor != 1.0:
            recipe = recipes + number * RECIPE + _OF_STATES + which * _STATE_WORDS
            state = layer + SECOND + which * (FIRST - SECOND)
            _multiply(tl.load(state), tl.load(recipe + _NUMEL), factor, SHARES, TILE)
            _multiply(tl.load(state + STATE_COLUMNS), tl.load(recipe + _COLUMN_NUMEL), factor, SHARES, TILE)


@inlined
def _multiply(
    address: tl.tensor, numel: tl.tensor, factor: tl.tensor, SHARES: tl.constexpr, TILE: tl.constexpr
) -> None:
    values = address.to(tl.pointer_type(tl.float32))
    for start in range(tl.program_id(1) * TILE, numel, SHARES * TILE):
        at = start + tl.arange(0, TILE).to(tl.int64)
        tl.store(values + at, tl.load(values + at, mask=at < numel, other=0.0) * factor, mask=at < numel)


@kernel(*(f"a{i}" for i in range(_ADDRESSES)))
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
