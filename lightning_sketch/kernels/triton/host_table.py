"""The table of layers as the host writes it: which layers share launches, and the words of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.kernels.program import Words
from lightning_sketch.kernels.schema import FusedStep, KernelState, state_numbers
from lightning_sketch.kernels.triton.device_numbers import device_words
from lightning_sketch.kernels.triton.launches import Launched, launch, launch_observe
from lightning_sketch.kernels.triton.layout import Key, Laid, holds_step, lay_out
from lightning_sketch.kernels.triton.orders import Order, Sorting, find_orders
from lightning_sketch.kernels.triton.recipes import NUMBERS_ON_DEVICE, OF_STATES_ON_DEVICE
from lightning_sketch.kernels.triton.table import (
    COUNT,
    FLOATS,
    NAMES,
    PADDING,
    PROGRAMS,
    ROW,
    RULE,
    SCRATCH,
    STATE_WORDS,
)


@dataclass
class Group:
    """Layers with one key, one behind the other in the table.

    Args:
        begin: the first of them.
        count: how many.
        programs: of each kernel for all of them, by its name in `PROGRAMS`.
        sorted: rows by bucket of the second and the first state's sketches, where these have orders of their own.
    """

    begin: int
    count: int
    programs: dict[str, int] = field(default_factory=dict)
    sorted: tuple[Sorting | None, Sorting | None] = (None, None)


class Table:
    """The words of all layers.

    Args:
        layers: steps on one device.

    Attributes:
        groups: layers by key.
        laid: for each row of the table, how the layer is cut into programs.
        places: and where in the memory of float32 its pieces begin, as `Laid.floats` has them.
        numbers: for each row of the table, which of `layers` it is of.
        words: the rows; ``None`` if there are none, or numbers stay on the device.
    """

    def __init__(self, layers: Sequence[FusedStep]) -> None:
        by_key: dict[Key, list[tuple[int, FusedStep, Laid]]] = {}
        floats, zeros = 0, len(layers)  # float32, and words of 64 bits
        for number, step in enumerate(layers):
            if step.grad.numel():
                laid = laid_of(step)
                by_key.setdefault(laid.key, []).append((number, step, laid))
                floats += sum(laid.floats)
                zeros += laid.sums + (laid.exponents + 3) // 2
        if layers[0].on_device is not None:  # of all, or of none
            zeros += len(layers)  # for `device_words`
        self._device, self._count, self._sizes = layers[0].param.device, len(layers), (floats, zeros)
        self.groups: dict[Key, Group] = {}
        at, at_zero, begin = 0, 8 * len(layers), 0  # distances from the beginning of the memory that programs share
        self.laid: list[Laid] = []
        self.places: list[list[int]] = []
        words: list[bytes] = []
        order: list[FusedStep] = []
        for key, members in by_key.items():
            group = self.groups[key] = Group(begin, len(members))
            group.sorted = _orders(key, [step for _, step, _ in members])
            programs = [0] * len(PROGRAMS)
            for position, (number, step, laid) in enumerate(members):
                pieces = []
                for size in laid.floats:
                    pieces.append(at)
                    at += 4 * size
                exponents = at_zero + 8 * laid.sums
                scratch = (8 * number, *pieces, exponents, at_zero, exponents)
                at_zero = exponents + (laid.exponents + 3) // 2 * 8
                order.append(step)
                self.laid.append(laid)
                self.places.append([place // 4 for place in pieces])
                orders = [None if found is None else found.orders[position] for found in group.sorted]
                words.append(pack(step, laid, scratch, orders, programs))
                programs = [sum(pair) for pair in zip(programs, laid.programs, strict=True)]
            group.programs = dict(zip(PROGRAMS, programs, strict=True))
            begin += len(members)
        self.numbers = [number for members in by_key.values() for number, _, _ in members]
        self.words: Words | None = None
        self._resident: tuple[list[FusedStep], list[bytes]] | None = None
        if layers[0].on_device is not None:
            self._resident = order, words
        elif words:
            self.words = Words(bytearray(b"".join(words)), len(words), _NUMBER_WORDS, _SEED_WORDS)

    @property
    def repeats(self) -> bool:
        """Whether it serves for further steps of the layers, with other gradients and numbers."""
        if self.words is None or len(self.numbers) < self._count:
            return False
        return not any(key.sparse or key.insertions for key in self.groups)  # orders of rows may change

    def launch(self) -> Tensor:
        """All launches of a step, which returns what `step` does."""
        return self._launch(launch)[1][: self._count]

    def observe(self) -> Tensor:
        """The launches before anything changes; the memory of float32, which then has means of rows and sums."""
        return self._launch(launch_observe)[0]

    def _launch(self, launches: Callable[[Key, Tensor, Launched], None]) -> tuple[Tensor, Tensor]:
        """Memory of float32 and of int64 after some launches."""
        device, (floats, zeros) = self._device, self._sizes
        if not self.groups:
            return torch.empty(0, dtype=torch.float32, device=device), torch.zeros(
                zeros, dtype=torch.int64, device=device
            )
        guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with guard:
            scratch = torch.empty(floats, dtype=torch.float32, device=device)
            zeroed = torch.zeros(zeros, dtype=torch.int64, device=device)
            if self._resident is not None:
                table = device_words(*self._resident, scratch, zeroed)
            else:
                assert self.words is not None
                host = self.words.rows + _SCRATCH_WORDS * scratch.data_ptr() + _ZEROS_WORDS * zeroed.data_ptr()
                # Pinned, so that the copy waits for nothing; torch keeps that memory until the copy is made.
                pinned = host.pin_memory() if device.type == "cuda" else host
                table = pinned.to(device, non_blocking=True).view(-1)
            for key, group in self.groups.items():
                launches(key, table, group)
        return scratch, zeroed


def _marks(names: Collection[str]) -> Tensor:
    """1 for some words of a row, 0 for the others."""
    return torch.tensor([name in names for name in NAMES] + [False] * (COUNT - len(NAMES)), device="cpu").long()


_ZEROS = ("count", "largest", "sums", "exponents")
_ZEROS_WORDS, _SCRATCH_WORDS = _marks(_ZEROS), _marks([name for name in SCRATCH if name not in _ZEROS])
_NUMBER_WORDS = [2 * NAMES.index(name) for name in FLOATS]
_SEED_WORDS = [NAMES.index(f"{state}_seed") for state in ("second", "first", "momentum")]
GRAD_WORD = NAMES.index("grad")


def _orders(key: Key, steps: list[FusedStep]) -> tuple[Sorting | None, Sorting | None]:
    """Rows by bucket of each insertion of layers with one key: by the second state's sketches, and by the first's."""
    second = first = None
    for into_second, _, _ in key.insertions:
        if into_second:
            second = find_orders([(step, step.second) for step in steps if step.second], key.by_bucket, 0)
        else:
            first = find_orders([(step, step.first) for step in steps if step.first], key.by_bucket, 1)
    return second, first


def pack(
    step: FusedStep, laid: Laid, scratch: tuple[int, ...], orders: list[Order | None], programs: list[int]
) -> bytes:
    """The words of a layer, named in table.py."""
    second, first, momentum = step.second, step.first, step.momentum
    on_device = step.on_device is not None
    return (
        ROW.pack(
            step.row_offset,
            step.column_offset,
            step.param.data_ptr(),
            0 if on_device else step.grad.data_ptr(),
            0 if step.ids is None else step.ids.data_ptr(),
            laid.rows,
            laid.columns,
            step.all_rows,
            *(_NOTHING if second is None else _state(second, on_device)),
            *(_NOTHING if first is None else _state(first, on_device)),
            *(_NOTHING if momentum is None else _state(momentum, on_device)),
            *(_rule_on_device if on_device else _rule)(step),
            -1.0 if step.maximize else 1.0,
            1.0 / laid.columns,
            1.0 if second is None else 1.0 / float(second.scale),
            *scratch,
            *(word for order in orders for word in (_UNSORTED if order is None else order.words())),
            *programs,
            laid.splits,
            laid.blocks,
        )
        + PADDING
    )


_NOTHING = (0,) * len(STATE_WORDS)
_UNSORTED = (0, 0, 0, 0, 0, 0)
_rule = attrgetter(*RULE)


def _rule_on_device(step: FusedStep) -> tuple[float, ...]:
    """`_rule`, with zeros for what may change from step to step: that is written there."""
    zeros: dict[str, Any] = dict.fromkeys(NUMBERS_ON_DEVICE, 0.0)
    return _rule(replace(step, **zeros))


def _state(stored: KernelState, on_device: bool) -> tuple[int | float, ...]:
    columns = 0 if stored.columns is None else stored.columns.data_ptr()
    if on_device:
        zeros: dict[str, Any] = dict.fromkeys(OF_STATES_ON_DEVICE, 0.0)
        stored = replace(stored, **zeros)
    return stored.data.data_ptr(), columns, *state_numbers(stored)


def laid_of(step: FusedStep) -> Laid:
    """`lay_out`, or what it said of the layer's last step where that was the same."""
    aligned = _aligned(step)
    cache = step.cache if step.ids is None else None  # other rows at every step
    if cache is None:
        return lay_out(step, aligned)
    what = aligned, step.leave_out, step.weight_decay != 0, step.use_bound, step.nesterov != 0, holds_step(step)
    if cache.laid is None or cache.laid[0] != what:
        cache.laid = what, lay_out(step, aligned)
    found: Laid = cache.laid[1]
    return found


def _aligned(step: FusedStep) -> bool:
    """Whether all tensors of a step begin at multiples of 16 bytes."""
    address = step.param.data_ptr() | step.grad.data_ptr()
    for stored in (step.second, step.first, step.momentum):
        if stored is not None:
            address |= stored.data.data_ptr()
    return address % 16 == 0
