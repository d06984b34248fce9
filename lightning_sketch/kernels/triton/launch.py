"""Steps of many layers in a few launches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_sketch.kernels.capture import capturing
from lightning_sketch.kernels.program import Words
from lightning_sketch.kernels.reference import signed
from lightning_sketch.kernels.schema import FusedStep, KernelState, Kind
from lightning_sketch.kernels.triton.apply import apply
from lightning_sketch.kernels.triton.columns import finish_factored, finish_sm3, reduce_columns
from lightning_sketch.kernels.triton.device_numbers import device_words, hold
from lightning_sketch.kernels.triton.insert import hash_rows, insert
from lightning_sketch.kernels.triton.jit import OPTIONS, WIDE_OPTIONS
from lightning_sketch.kernels.triton.layout import (
    GROUP,
    SPAN,
    TILE_COLUMNS,
    TILE_FINISH,
    TILE_HASH,
    TILE_SKETCH,
    Key,
    Laid,
    ceil,
    lay_out,
)
from lightning_sketch.kernels.triton.observe import observe, settle
from lightning_sketch.kernels.triton.orders import Order, Sorting, find_orders
from lightning_sketch.kernels.triton.quantized import hash_columns
from lightning_sketch.kernels.triton.row_sketch import add_rows, fold_rows
from lightning_sketch.kernels.triton.table import COUNT, FLOATS, NAMES, PADDING, PROGRAMS, ROW, SCRATCH


def step(layers: Sequence[FusedStep]) -> Tensor:
    """Perform the steps of all `layers`, which are on one device (their parameters and states modified in place).

    Returns:
        how many rows (elements where all states are element-wise) of each were left out, int64 ``[len(layers)]`` on the
        device, for which it does not wait.
    """
    table = Table(layers)
    left_out = table.launch()
    changed = [layer.param for layer in layers]
    for layer in layers:
        changed += layer.tensors()
    increment_version(changed)  # kernels write through addresses, of which autograd knows nothing
    if (cache := layers[0].cache) is not None:
        cache.program = _Program(layers, table) if table.repeats else None
    return left_out


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
        numbers: for each row of the table, which of `layers` it is of.
        words: the rows; ``None`` if there are none, or numbers stay on the device.
    """

    def __init__(self, layers: Sequence[FusedStep]) -> None:
        by_key: dict[Key, list[tuple[int, FusedStep, Laid]]] = {}
        floats, zeros = 0, len(layers)  # float32, and words of 64 bits
        for number, step in enumerate(layers):
            if step.grad.numel():
                laid = _laid(step)
                by_key.setdefault(laid.key, []).append((number, step, laid))
                floats += sum(laid.floats)
                zeros += laid.sums + (laid.exponents + 3) // 2
        self._device, self._count, self._sizes = layers[0].param.device, len(layers), (floats, zeros)
        self.groups: dict[Key, Group] = {}
        at, at_zero, begin = 0, 8 * len(layers), 0  # distances from the beginning of the memory that programs share
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
                orders = [None if found is None else found.orders[position] for found in group.sorted]
                words.append(_pack(step, laid, scratch, orders, programs))
                programs = [sum(pair) for pair in zip(programs, laid.programs, strict=True)]
            group.programs = dict(zip(PROGRAMS, programs, strict=True))
            begin += len(members)
        self.numbers = [number for members in by_key.values() for number, _, _ in members]
        self.words: Words | None = None
        self._resident: tuple[list[FusedStep], list[bytes]] | None = None
        if layers[0].on_device is not None:  # of all, or of none
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
        device, (floats, zeros) = self._device, self._sizes
        if not self.groups:
            return torch.zeros(zeros, dtype=torch.int64, device=device)
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
                _launch(key, table, group)
        return zeroed[: self._count]


def _marks(names: Collection[str]) -> Tensor:
    """1 for some words of a row, 0 for the others."""
    return torch.tensor([name in names for name in NAMES] + [False] * (COUNT - len(NAMES))).long()


_ZEROS = ("count", "largest", "sums", "exponents")
_ZEROS_WORDS, _SCRATCH_WORDS = _marks(_ZEROS), _marks([name for name in SCRATCH if name not in _ZEROS])
_NUMBER_WORDS = [2 * NAMES.index(name) for name in FLOATS]
_SEED_WORDS = [NAMES.index(f"{state}_seed") for state in ("second", "first", "momentum")]
_GRAD_WORD = NAMES.index("grad")


class _Program:
    """A `Program` of the layers of a table."""

    def __init__(self, layers: Sequence[FusedStep], table: Table) -> None:
        self.kernel = step
        self.addresses, self._table = [layer.addresses() for layer in layers], table
        self._keys = {number: key for key, group in table.groups.items() for number in _numbers(table, group)}

    def follow(self, leaders: Sequence[int]) -> None:
        numbers, words = self._table.numbers, self._table.words
        assert words is not None
        rows = {number: row for row, number in enumerate(numbers)}
        words.follow([rows[leaders[number]] for number in numbers])
        leading = sorted(set(leaders))
        self._leading = leading
        self._in_rows = sorted(range(len(leading)), key=lambda i: rows[leading[i]])  # steps, in the order of the table

    def takes(self, steps: Sequence[FusedStep], grads: Sequence[Tensor]) -> bool:
        if any(_laid(step).key != self._keys[number] for number, step in zip(self._leading, steps, strict=True)):
            return False
        keys = self._keys
        return all(grad.data_ptr() % 16 == 0 or not keys[number].aligned for number, grad in enumerate(grads))

    def again(
        self, steps: Sequence[FusedStep], params: list[Tensor], grads: list[Tensor], states: list[Tensor]
    ) -> Tensor:
        table, words, packed = self._table, self._table.words, bytearray()
        assert words is not None
        for i in self._in_rows:
            packed += _pack(steps[i], _laid(steps[i]), _NO_SCRATCH, [None, None], _NO_PROGRAMS)
        words.write(packed)
        words.rows[:, _GRAD_WORD] = torch.tensor([grads[number].data_ptr() for number in table.numbers])
        left_out = table.launch()
        increment_version(params + states)
        return left_out


def _numbers(table: Table, group: Group) -> list[int]:
    return table.numbers[group.begin : group.begin + group.count]


_NO_SCRATCH, _NO_PROGRAMS = (0,) * len(SCRATCH), [0] * len(PROGRAMS)


def _orders(key: Key, steps: list[FusedStep]) -> tuple[Sorting | None, Sorting | None]:
    """Rows by bucket of each insertion of layers with one key: by the second state's sketches, and by the first's."""
    second = first = None
    for into_second, _, _ in key.insertions:
        if into_second:
            second = find_orders([(step, step.second) for step in steps if step.second], key.by_bucket, 0)
        else:
            first = find_orders([(step, step.first) for step in steps if step.first], key.by_bucket, 1)
    return second, first


def _pack(
    step: FusedStep, laid: Laid, scratch: tuple[int, ...], orders: list[Order | None], programs: list[int]
) -> bytes:
    """The words of a layer, named in table.py."""
    second, first, momentum = step.second, step.first, step.momentum
    on_device = step.on_device is not None
    if on_device:  # what may change from step to step is written there
        step = replace(step, lr=0.0, decay_factor=0.0, eps=0.0, correction=0.0)
    return (
        ROW.pack(
            step.param.data_ptr(),
            0 if on_device else step.grad.data_ptr(),
            0 if step.ids is None else step.ids.data_ptr(),
            laid.rows,
            laid.columns,
            step.row_offset,
            step.column_offset,
            step.ids is None or len(step.ids) == len(step.param),
            *(_NOTHING if second is None else _state(second, on_device)),
            *(_NOTHING if first is None else _state(first, on_device)),
            *(_NOTHING if momentum is None else _state(momentum, on_device)),
            step.lr,
            step.decay_factor,
            step.eps,
            step.weight_decay,
            step.correction,
            step.bound or 0.0,
            step.nesterov,
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


_NOTHING = (0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)
_UNSORTED = (0, 0, 0, 0, 0, 0)


def _state(stored: KernelState, on_device: bool) -> tuple[int | float, ...]:
    return (
        stored.data.data_ptr(),
        0 if stored.columns is None else stored.columns.data_ptr(),
        stored.width,
        signed(stored.seed),
        *((0.0, 0.0, 0.0, 0.0) if on_device else (stored.decay, stored.weight, stored.column_weight, stored.scale)),
    )  # type: ignore[return-value]  # numbers, where they are not on the device


def _laid(step: FusedStep) -> Laid:
    """`lay_out`, or what it said of the layer's last step where that was the same."""
    aligned = _aligned(step)
    cache = step.cache if step.ids is None else None  # other rows at every step
    if cache is None:
        return lay_out(step, aligned)
    what = aligned, step.leave_out, step.weight_decay != 0, step.bound is not None, step.nesterov != 0
    if cache.laid is None or cache.laid[0] != what:
        cache.laid = what, lay_out(step, aligned)
    found: Laid = cache.laid[1]
    return found


def _launch(key: Key, table: Tensor, group: Group) -> None:
    """All launches of the layers with one key."""
    count = group.count
    words = table[group.begin * COUNT :]
    programs = group.programs
    search = 0 if count == 1 else -(-(count - 1).bit_length() // 3) * 3  # few values, each of which is compiled
    common: dict[str, Any] = {
        "HALF": key.half,
        "SPARSE": key.sparse,
        "DECAYED": key.decayed,
        "LEAVE_OUT": key.leave_out,
    }
    common |= {"ALIGNED": key.aligned, "SEARCH": search}
    if key.observed:
        rows, columns = key.observe_tile
        seen = common | {
            "KIND": int(key.second),
            "DEPTH": key.second_depth if key.second == Kind.ROW_SKETCH else 0,
            "BLOCK_ROWS": key.block_rows,
            "TILE_ROWS": rows,
            "TILE_COLUMNS": columns,
        }
        options = OPTIONS | {"num_warps": key.observe_warps}
        observe[(programs["observe"],)](words, count, **seen, ONE_CHUNK=key.one_chunk, **options)
        if not key.one_chunk:
            settle[(programs["settle"],)](words, count, **seen, **OPTIONS)
    if key.second == Kind.ROW_SKETCH:
        add_rows[(programs["add"],)](
            words,
            count,
            DEPTH=key.second_depth,
            SPARSE=key.sparse,
            SEARCH=search,
            TILE_ROWS=TILE_SKETCH,
            **OPTIONS,
        )
        fold_rows[(programs["fold"],)](words, count, DEPTH=key.second_depth, SEARCH=search, TILE=TILE_SKETCH, **OPTIONS)
    if key.second == Kind.FACTORED:
        reduce_columns[(programs["reduce"],)](
            words, count, GROUP=GROUP, SEARCH=search, TILE_ROWS=16, TILE_COLUMNS=TILE_COLUMNS, **WIDE_OPTIONS
        )
        finish_factored[(count,)](words, count, GROUP=GROUP, TILE=1024, **WIDE_OPTIONS)
    for into_second, into_first, depth in key.insertions:
        _insert(key, group, words, common, into_second, into_first, depth)
    if key.quantized:
        hash_columns[(programs["hash_columns"],)](
            words,
            count,
            SECOND_KIND=int(key.second),
            FIRST_KIND=int(key.first),
            SEARCH=search,
            TILE=TILE_HASH,
            **OPTIONS,
        )
    rows, columns = key.apply_tile
    apply[(programs["apply"],)](
        words,
        count,
        SECOND_KIND=int(key.second),
        FIRST_KIND=int(key.first),
        MOMENTUM_KIND=int(key.momentum),
        SECOND_HALF=key.second_half,
        FIRST_HALF=key.first_half,
        MOMENTUM_HALF=key.momentum_half,
        SECOND_DEPTH=key.second_depth,
        FIRST_DEPTH=key.first_depth,
        SECOND_BLOCK=key.second_block,
        FIRST_BLOCK=key.first_block,
        **common,
        BOUNDED=key.bounded,
        NESTEROV_USED=key.nesterov,
        COLUMNS_USED=key.columns_used,
        OBSERVED=key.observed,
        BY_ROWS=key.by_rows,
        AT_ONCE=key.at_once,
        SPAN=SPAN if key.split else 0,
        TILE_ROWS=rows,
        TILE_COLUMNS=columns,
        **(OPTIONS | {"num_warps": key.apply_warps}),
    )
    if key.columns_used:
        finish_sm3[(programs["finish"],)](words, count, SEARCH=search, TILE=TILE_FINISH, **OPTIONS)


def _insert(
    key: Key, group: Group, words: Tensor, common: dict[str, Any], into_second: bool, into_first: bool, depth: int
) -> None:
    """Insert rows into one or both states' sketches, in two launches at most, and a sort where no order was kept."""
    count, sketch = group.count, "second" if into_second else "first"
    rows = group.sorted[0 if into_second else 1]
    assert rows is not None
    for begin, end in rows.runs():  # hashing would overwrite an order that was kept
        hash_rows[(sum(ceil(order.of[0], TILE_SKETCH) for order in rows.orders[begin:end]),)](
            words[begin * COUNT :],
            end - begin,
            OF_SECOND=into_second,
            DEPTH=depth,
            SPARSE=key.sparse,
            SEARCH=common["SEARCH"],
            TILE_ROWS=TILE_SKETCH,
            **OPTIONS,
        )
    rows.sort(0 if into_second else 1)
    if capturing():
        hold(*(tensor for order in rows.orders for tensor in order.batch.tensors()))
    slots, columns = key.insert_tile
    insert[(group.programs[f"insert_{sketch}"],)](
        words,
        count,
        INTO_SECOND=into_second,
        INTO_FIRST=into_first,
        **common,
        BY_BUCKET=key.by_bucket,
        TILE_SLOTS=slots,
        TILE_COLUMNS=columns,
        **OPTIONS,
    )


def _aligned(step: FusedStep) -> bool:
    """Whether all tensors of a step begin at multiples of 16 bytes."""
    address = step.param.data_ptr() | step.grad.data_ptr()
    for stored in (step.second, step.first, step.momentum):
        if stored is not None:
            address |= stored.data.data_ptr()
    return address % 16 == 0
