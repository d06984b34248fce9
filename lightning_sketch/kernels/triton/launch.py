"""Steps of many layers in a few launches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_sketch.kernels.reference import signed
from lightning_sketch.kernels.schema import FusedStep, Kind, Stored
from lightning_sketch.kernels.triton.apply import apply
from lightning_sketch.kernels.triton.columns import finish_factored, finish_sm3, reduce_columns
from lightning_sketch.kernels.triton.device_numbers import device_words
from lightning_sketch.kernels.triton.insert import insert
from lightning_sketch.kernels.triton.jit import OPTIONS
from lightning_sketch.kernels.triton.layout import (
    GROUP,
    SPAN,
    TILE_COLUMNS,
    TILE_FINISH,
    TILE_HASH,
    TILE_SKETCH,
    Key,
    Laid,
    lay_out,
)
from lightning_sketch.kernels.triton.observe import observe
from lightning_sketch.kernels.triton.quantized import hash_columns
from lightning_sketch.kernels.triton.row_sketch import add_rows, fold_rows
from lightning_sketch.kernels.triton.table import COUNT, PADDING, ROW


def step(layers: Sequence[FusedStep]) -> Tensor:
    """Perform the steps of all `layers`, which are on one device (their parameters and states modified in place).

    Returns:
        how many rows (elements where all states are element-wise) of each were left out, int64 ``[len(layers)]`` on the
        device, for which it does not wait.
    """
    device = layers[0].param.device
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        table = Table(layers, device)
        for key, group in table.groups.items():
            _launch(key, table, group)
    changed = [layer.param for layer in layers]
    for layer in layers:
        changed += layer.tensors()
    increment_version(changed)  # kernels write through addresses, of which autograd knows nothing
    return table.left_out


@dataclass
class Group:
    """Layers with one key, one behind the other in the table.

    Args:
        begin: the first of them.
        count: how many.
        programs: of each kernel for all of them, in the order of `Laid.programs`.
        inserted: those whose rows are inserted into sketches, with the means that `observe` stores, and which layer of
            the table they are.
    """

    begin: int
    count: int
    programs: tuple[int, int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0, 0)
    inserted: list[tuple[FusedStep, Tensor, int]] = field(default_factory=list)


class Table:
    """The words of all layers, and the memory that they point to.

    Args:
        layers: steps on one device.

    Attributes:
        groups: layers by key.
        left_out: int64 ``[len(layers)]``, in the order of the layers.
    """

    def __init__(self, layers: Sequence[FusedStep], device: torch.device) -> None:
        by_key: dict[Key, list[tuple[int, FusedStep, Laid]]] = {}
        floats, zeros = 0, len(layers)  # float32, and words of 64 bits
        for number, step in enumerate(layers):
            if step.grad.numel():
                laid = _laid(step)
                by_key.setdefault(laid.key, []).append((number, step, laid))
                floats += sum(laid.floats)
                zeros += laid.sums + (laid.exponents + 3) // 2
        self.scratch = torch.empty(floats, dtype=torch.float32, device=device)
        self.zeros = torch.zeros(zeros, dtype=torch.int64, device=device)
        self.left_out = self.zeros[: len(layers)]
        self.groups: dict[Key, Group] = {}
        on_device = layers[0].on_device is not None  # of all, or of none
        # Tables that stay where they are hold distances from the beginning of both.
        address, zero = (0, 0) if on_device else (self.scratch.data_ptr(), self.zeros.data_ptr())
        at, at_zero, begin = address, zero + 8 * len(layers), 0
        words: list[bytes] = []
        order: list[FusedStep] = []
        for key, members in by_key.items():
            group = self.groups[key] = Group(begin, len(members))
            observe = add = fold = reduce = finish = apply = hashing = 0
            for number, step, laid in members:
                means = at
                partials = means + 4 * laid.floats[0]
                groups = partials + 4 * laid.floats[1]
                shape = groups + 4 * laid.floats[2]
                hashes = shape + 4 * laid.floats[3]
                at = hashes + 4 * laid.floats[4]
                exponents = at_zero + 8 * laid.sums
                scratch = (zero + 8 * number, means, partials, groups, shape, exponents, at_zero, exponents, hashes)
                at_zero = exponents + (laid.exponents + 3) // 2 * 8
                order.append(step)
                words.append(_pack(step, laid, scratch, (observe, add, fold, reduce, finish, apply, hashing)))
                more = laid.programs
                observe, add, fold = observe + more[0], add + more[1], fold + more[2]
                reduce, finish, apply = reduce + more[3], finish + more[4], apply + more[5]
                hashing += more[6]
                if key.inserts:
                    first = (means - address) // 4
                    group.inserted.append((step, self.scratch[first : first + laid.rows], len(words) - 1))
            group.programs = observe, add, fold, reduce, finish, apply, hashing
            begin += len(members)
        if on_device and order:
            self.words = device_words(order, words, self.scratch, self.zeros)
            return
        host = torch.frombuffer(bytearray(b"".join(words)) or bytearray(8), dtype=torch.int64)
        # Pinned, so that the copy waits for nothing; torch keeps that memory until the copy is made.
        self.words = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _pack(step: FusedStep, laid: Laid, scratch: tuple[int, ...], programs: tuple[int, ...]) -> bytes:
    """The words of a layer, named in table.py."""
    second, first, momentum = step.second, step.first, step.momentum
    on_device = step.on_device is not None
    if on_device:  # what may change from step to step is written there
        step = replace(step, lr=0.0, shrink=0.0, eps=0.0, correction=0.0)
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
            step.shrink,
            step.eps,
            step.weight_decay,
            step.correction,
            step.bound or 0.0,
            step.nesterov,
            -1.0 if step.negate else 1.0,
            1.0 / laid.columns,
            1.0 if second is None else 1.0 / float(second.scale),
            *scratch,
            *programs,
            laid.splits,
            laid.programs[0],
        )
        + PADDING
    )


_NOTHING = (0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def _state(stored: Stored, on_device: bool) -> tuple[int | float, ...]:
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
    kept = step.kept if step.ids is None else None  # other rows at every step
    if kept is None:
        return lay_out(step, aligned)
    what = aligned, step.leave_out, step.weight_decay != 0, step.bound is not None, step.nesterov != 0
    if kept.laid is None or kept.laid[0] != what:
        kept.laid = what, lay_out(step, aligned)
    found: Laid = kept.laid[1]
    return found


def _launch(key: Key, table: Table, group: Group) -> None:
    """All launches of the layers with one key."""
    count = group.count
    words = table.words[group.begin * COUNT :]
    observing, adding, folding, reducing, finishing, applying, hashing = group.programs
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
        observe[(observing,)](
            words,
            count,
            KIND=int(key.second),
            DEPTH=key.second_depth if key.second == Kind.ROW_SKETCH else 0,
            **common,
            TILE_ROWS=rows,
            TILE_COLUMNS=columns,
            **(OPTIONS | {"num_warps": key.observe_warps}),
        )
    if key.second == Kind.ROW_SKETCH:
        add_rows[(adding,)](
            words,
            count,
            DEPTH=key.second_depth,
            SPARSE=key.sparse,
            SEARCH=search,
            TILE_ROWS=TILE_SKETCH,
            **OPTIONS,
        )
        fold_rows[(folding,)](words, count, DEPTH=key.second_depth, SEARCH=search, TILE=TILE_SKETCH, **OPTIONS)
    if key.second == Kind.FACTORED:
        reduce_columns[(reducing,)](
            words, count, GROUP=GROUP, SEARCH=search, TILE_ROWS=16, TILE_COLUMNS=TILE_COLUMNS, **OPTIONS
        )
        finish_factored[(count,)](words, count, GROUP=GROUP, TILE=1024, **(OPTIONS | {"num_warps": 8}))
    if key.inserts:
        for step, means, number in group.inserted:
            layer = table.words[number * COUNT :]
            insert(step, layer, means if key.observed and key.leave_out else None)
    if key.quantized:
        hash_columns[(hashing,)](
            words,
            count,
            SECOND_KIND=int(key.second),
            FIRST_KIND=int(key.first),
            SEARCH=search,
            TILE=TILE_HASH,
            **OPTIONS,
        )
    rows, columns = key.apply_tile
    apply[(applying,)](
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
        finish_sm3[(finishing,)](words, count, SEARCH=search, TILE=TILE_FINISH, **OPTIONS)


def _aligned(step: FusedStep) -> bool:
    """Whether all tensors of a step begin at multiples of 16 bytes."""
    address = step.param.data_ptr() | step.grad.data_ptr()
    for stored in (step.second, step.first, step.momentum):
        if stored is not None:
            address |= stored.data.data_ptr()
    return address % 16 == 0
