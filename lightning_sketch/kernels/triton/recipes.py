"""Recipes: where the device finds the numbers of a step of a layer, one row of 64-bit words for each layer."""

from __future__ import annotations

import struct
from operator import attrgetter

from torch import Tensor

from lightning_sketch.kernels.fields import STATES, Kind
from lightning_sketch.kernels.schema import FusedStep, KernelState

#: Of a step, what may lie on the device.
NUMBERS_ON_DEVICE = ("lr", "decay_factor", "eps", "correction")
#: Of a state, what is written there.
OF_STATES_ON_DEVICE = ("decay", "weight", "column_weight", "scale")
#: Words. Of numbers: where they are among the values of a step, or -1; and what they are then, a float64.
STATE_NAMES = (
    *("scale_at", "decay", "weight_at", "weight", "column_weight"),
    *("divided", "counted", "numel", "column_numel"),
)
NAMES = (
    "step",
    "amp",
    *(f"{name}{at}" for name in NUMBERS_ON_DEVICE for at in ("_at", "")),
    *(f"{state}_{name}" for state in STATES for name in STATE_NAMES),
)
_FLOATS = {*NUMBERS_ON_DEVICE, *(f"{s}_{n}" for s in STATES for n in ("decay", "weight", "column_weight"))}
_RECIPE = struct.Struct("<" + "".join("d" if name in _FLOATS else "q" for name in NAMES))
_numbers = attrgetter(*NUMBERS_ON_DEVICE)
#: Kinds that are stored divided by a scale, weights too; of SM3 weights are not.
_DIVIDED_KINDS = (Kind.SCALED, Kind.ROW, Kind.ROW_SKETCH, Kind.FACTORED, Kind.SKETCH)


class Values:
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


def states_of(step: FusedStep) -> tuple[KernelState | None, KernelState | None, KernelState | None]:
    return step.second, step.first, step.momentum


def is_scaled(step: FusedStep) -> bool:
    """Whether a gradient scaler has a say in a step."""
    device = step.on_device
    return device is not None and (device.found_inf is not None or device.grad_scale is not None)


def recipe(step: FusedStep, values: Values) -> bytes:
    """The words of a layer; its numbers that are known on the device alone are added to `values`."""
    assert step.on_device is not None
    numbers: list[float] = [values.at(step.on_device.step)[0], is_scaled(step)]
    for number in _numbers(step):
        numbers += values.at(number)
    for stored in states_of(step):
        numbers += _NO_STATE if stored is None else _of_state(stored, values)
    return _RECIPE.pack(*numbers)


_NO_STATE: tuple[float, ...] = (0, 0.0, -1, 0.0, 0.0, 0, 0, 0, 0)


def _of_state(stored: KernelState, values: Values) -> tuple[float, ...]:
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
