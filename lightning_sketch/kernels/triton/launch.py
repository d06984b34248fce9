"""Steps of many layers in a few launches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_sketch.kernels.fused import FusedStep, Kind
from lightning_sketch.kernels.triton.apply import apply
from lightning_sketch.kernels.triton.columns import finish_factored, finish_sm3, reduce_columns
from lightning_sketch.kernels.triton.insert import insert, signed
from lightning_sketch.kernels.triton.layout import (
    GROUP,
    NO_STATE,
    SPAN,
    TILE_COLUMNS,
    TILE_FINISH,
    TILE_SKETCH,
    Key,
    Laid,
    lay_out,
)
from lightning_sketch.kernels.triton.observe import observe
from lightning_sketch.kernels.triton.row_sketch import add_rows, fold_rows
from lightning_sketch.kernels.triton.table import COUNT, PADDING, ROW

#: As little fusing of multiplications and additions as in the reference; memory is what takes time.
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


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
        for key, (begin, laid) in table.groups.items():
            _launch(key, table, begin, laid)
    changed = [layer.param for layer in layers]
    for layer in layers:
        changed += layer.tensors()
    increment_version(changed)  # kernels write through addresses, of which autograd knows nothing
    return table.left_out


class Table:
    """The words of all layers, and the memory that they point to.

    Args:
        layers: steps on one device.

    Attributes:
        groups: for each key the position of its first layer in the table, and its layers.
        left_out: int64 ``[len(layers)]``, in the order of the layers.
    """

    def __init__(self, layers: Sequence[FusedStep], device: torch.device) -> None:
        by_key: dict[Key, list[tuple[int, FusedStep, Laid]]] = {}
        floats, zeros = 0, len(layers)  # float32, and words of 64 bits
        for number, step in enumerate(layers):
            if step.grad.numel():
                laid = lay_out(step, _aligned(step))
                by_key.setdefault(laid.key, []).append((number, step, laid))
                floats += sum(map(_padded, laid.floats))
                sums, exponents, largest = laid.zeros(_slots(step))
                zeros += sums + (exponents + largest + 3) // 2
        self.scratch = torch.empty(floats, dtype=torch.float32, device=device)
        self.zeros = torch.zeros(zeros, dtype=torch.int64, device=device)
        self.left_out = self.zeros[: len(layers)]
        self.groups: dict[Key, tuple[int, list[tuple[FusedStep, Laid, Tensor]]]] = {}
        address, zero = self.scratch.data_ptr(), self.zeros.data_ptr()
        at, at_zero, count = address, zero + 8 * len(layers), 0
        words: list[bytes] = []
        for key, group in by_key.items():
            programs = [0] * 6
            own: list[tuple[FusedStep, Laid, Tensor]] = []
            for number, step, laid in group:
                places = []
                for size in laid.floats:
                    places.append(at)
                    at += 4 * _padded(size)
                sums, exponents, largest = laid.zeros(_slots(step))
                end = at_zero + 8 * sums
                words.append(_pack(step, laid, zero + 8 * number, places, end, at_zero, programs))
                at_zero = end + (exponents + largest + 3) // 2 * 8
                for i, more in enumerate((laid.observe, laid.add, laid.fold, laid.reduce, laid.finish, laid.apply)):
                    programs[i] += more
                means = (places[0] - address) // 4
                own.append((step, laid, self.scratch[means : means + laid.rows]))
            self.groups[key] = count, own
            count += len(own)
        host = torch.frombuffer(bytearray(b"".join(words)) or bytearray(8), dtype=torch.int64)
        # Pinned, so that the copy waits for nothing; torch keeps that memory until the copy is made.
        self.words = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _pack(
    step: FusedStep, laid: Laid, count: int, places: list[int], exponents: int, sums: int, programs: list[int]
) -> bytes:
    """The words of a layer, named in table.py."""
    words: list[int | float] = [
        step.param.data_ptr(),
        step.grad.data_ptr(),
        0 if step.ids is None else step.ids.data_ptr(),
        laid.rows,
        laid.columns,
        step.row_offset,
        step.column_offset,
        step.ids is None or len(step.ids) == len(step.param),
    ]
    for stored in (step.second, step.first, step.momentum):
        if stored is None:
            words += (0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)
        else:
            words += (
                stored.data.data_ptr(),
                0 if stored.columns is None else stored.columns.data_ptr(),
                stored.width,
                signed(stored.seed),
                stored.decay,
                stored.weight,
                stored.column_weight,
                stored.scale,
            )
    words += (step.lr, step.shrink, step.eps, step.weight_decay, step.correction, step.bound or 0.0, step.nesterov)
    scale = 1.0 if step.second is None else step.second.scale
    words += (
        -1.0 if step.negate else 1.0,
        1.0 / laid.columns,
        1.0 / scale,
        count,
        *places,
        exponents,
        sums,
        exponents,
        *programs,
    )
    return ROW.pack(*words, laid.splits, laid.observe) + PADDING


def _launch(key: Key, table: Table, begin: int, group: list[tuple[FusedStep, Laid, Tensor]]) -> None:
    """All launches of the layers with one key."""
    count = len(group)
    words = table.words[begin * COUNT :]
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
        observe[(sum(laid.observe for _, laid, _ in group),)](
            words,
            count,
            KIND=int(key.second),
            DEPTH=key.second_depth if key.second == Kind.ROW_SKETCH else 0,
            **common,
            TILE_ROWS=rows,
            TILE_COLUMNS=columns,
            **(_OPTIONS | {"num_warps": 8}),
        )
    if key.second == Kind.ROW_SKETCH:
        add_rows[(sum(laid.add for _, laid, _ in group),)](
            words,
            count,
            DEPTH=key.second_depth,
            SPARSE=key.sparse,
            SEARCH=search,
            TILE_ROWS=TILE_SKETCH,
            **_OPTIONS,
        )
        fold_rows[(sum(laid.fold for _, laid, _ in group),)](
            words, count, DEPTH=key.second_depth, SEARCH=search, TILE=TILE_SKETCH, **_OPTIONS
        )
    if key.second == Kind.FACTORED:
        reduce_columns[(sum(laid.reduce for _, laid, _ in group),)](
            words, count, GROUP=GROUP, SEARCH=search, TILE_ROWS=16, TILE_COLUMNS=TILE_COLUMNS, **_OPTIONS
        )
        finish_factored[(count,)](words, count, GROUP=GROUP, TILE=1024, **(_OPTIONS | {"num_warps": 8}))
    if key.inserts:
        for step, _, means in group:
            insert(step, means if key.observed and key.leave_out else None)
    rows, columns = key.apply_tile
    apply[(sum(laid.apply for _, laid, _ in group),)](
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
        **(_OPTIONS | {"num_warps": key.apply_warps}),
    )
    if key.columns_used:
        finish_sm3[(sum(laid.finish for _, laid, _ in group),)](
            words, count, SEARCH=search, TILE=TILE_FINISH, **_OPTIONS
        )


def _aligned(step: FusedStep) -> bool:
    """Whether all tensors of a step begin at multiples of 16 bytes."""
    address = step.param.data_ptr() | step.grad.data_ptr()
    for stored in (step.second, step.first, step.momentum):
        if stored is not None:
            address |= stored.data.data_ptr()
    return address % 16 == 0


def _slots(step: FusedStep) -> int:
    second = step.second or NO_STATE
    return second.depth * second.width


def _padded(size: int) -> int:
    """So many float32 that the next begin at a multiple of 16 bytes."""
    return -(-size // 4) * 4
