"""Fused steps on the CPU: torch operators over the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sketch.kernels import native
from lightning_sketch.kernels.fused import FusedStep, Kind, Stored


class _State(ctypes.Structure):
    """``State`` of csrc/layer.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("is_signed", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("width", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("decay", ctypes.c_float),
        ("weight", ctypes.c_float),
        ("column_weight", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("data", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class _Layer(ctypes.Structure):
    """``Layer`` of csrc/layer.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_offset", ctypes.c_int64),
        ("column_offset", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("all_rows", ctypes.c_int32),
        ("negate", ctypes.c_int32),
        ("use_bound", ctypes.c_int32),
        ("weight_decay", ctypes.c_float),
        ("shrink", ctypes.c_float),
        ("lr", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("correction", ctypes.c_float),
        ("bound", ctypes.c_float),
        ("nesterov", ctypes.c_float),
        ("unused", ctypes.c_int32),
        ("wave", ctypes.c_int64),
        ("second", _State),
        ("first", _State),
        ("momentum", _State),
    )


_STATES = ("second", "first", "momentum")
_ELEMENTWISE = {Kind.NONE, Kind.DENSE, Kind.SCALED}
_LINE = 4096  # elements
_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}


def step(layers: Sequence[FusedStep]) -> None:
    """Perform the steps of all `layers`, together on torch's threads."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    ids: list[Tensor] = []
    states: list[Tensor] = []
    packed: list[_Layer] = []
    for layer in layers:
        if layer.grad.numel() == 0:
            continue
        for part in _parts(layer):
            packed.append(_pack(part, params, grads, ids, states))
    if packed:
        program = torch.frombuffer((_Layer * len(packed))(*packed), dtype=torch.uint8)
        _launch(params, grads, ids, states, program)


def _launch(
    params: list[Tensor], grads: list[Tensor], ids: list[Tensor], states: list[Tensor], program: Tensor
) -> None:
    torch.ops.lightning_sketch.fused_step(params, grads, ids, states, program)


def all_finite(tensors: list[Tensor]) -> list[bool]:
    """Whether all elements of each tensor are finite; contiguous, float32 or bfloat16."""
    found: Tensor = torch.ops.lightning_sketch.all_finite(tensors)
    return [bool(x) for x in found.tolist()]


def _parts(layer: FusedStep) -> list[FusedStep]:
    """The step, or where nothing but elements counts, the same with lines long enough to be fast."""
    kinds = {Kind.NONE if state is None else state.kind for state in (layer.second, layer.first, layer.momentum)}
    numel = layer.grad.numel()
    if layer.ids is not None or numel // layer.grad.shape[0] >= _LINE or not kinds <= _ELEMENTWISE:
        return [layer]
    whole = numel // _LINE * _LINE
    return [
        _lines(layer, slice(start, stop), columns)
        for start, stop, columns in ((0, whole, _LINE), (whole, numel, numel - whole))
        if stop > start
    ]


def _lines(step: FusedStep, elements: slice, columns: int) -> FusedStep:
    def cut(tensor: Tensor) -> Tensor:
        return tensor.view(-1)[elements].view(-1, columns)

    def cut_state(state: Stored | None) -> Stored | None:
        return None if state is None else replace(state, data=cut(state.data))

    return replace(
        step,
        param=cut(step.param),
        grad=cut(step.grad),
        second=cut_state(step.second),
        first=cut_state(step.first),
        momentum=cut_state(step.momentum),
    )


def _pack(
    step: FusedStep, params: list[Tensor], grads: list[Tensor], ids: list[Tensor], states: list[Tensor]
) -> _Layer:
    """The step as a struct, with positions in the lists of tensors in place of addresses."""
    rows = step.grad.shape[0]
    layer = _Layer(
        rows=rows,
        columns=step.grad.numel() // rows,
        row_offset=step.row_offset,
        column_offset=step.column_offset,
        ids=_append(ids, step.ids),
        param=_append(params, step.param),
        grad=_append(grads, step.grad),
        dtype=_BFLOAT16[step.param.dtype],
        all_rows=rows == step.param.shape[0],
        negate=step.negate,
        use_bound=step.bound is not None,
        weight_decay=step.weight_decay,
        shrink=step.shrink,
        lr=step.lr,
        eps=step.eps,
        correction=step.correction,
        bound=step.bound or 0.0,
        nesterov=step.nesterov,
    )
    for name in _STATES:
        stored: Stored | None = getattr(step, name)
        if stored is not None:
            setattr(layer, name, _pack_state(stored, states))
    return layer


def _pack_state(stored: Stored, states: list[Tensor]) -> _State:
    return _State(
        kind=stored.kind,
        dtype=_BFLOAT16[stored.data.dtype],
        is_signed=stored.signed,
        depth=stored.depth,
        width=stored.width,
        seed=stored.seed & (1 << 64) - 1,
        decay=stored.decay,
        weight=stored.weight,
        column_weight=stored.column_weight,
        scale=stored.scale,
        data=_append(states, stored.data),
        columns=_append(states, stored.columns),
    )


def _append(tensors: list[Tensor], tensor: Tensor | None) -> int:
    """Position from 1; 0 for none."""
    if tensor is None:
        return 0
    tensors.append(tensor)
    return len(tensors)


def _fused_step(
    params: list[Tensor], grads: list[Tensor], ids: list[Tensor], states: list[Tensor], program: Tensor
) -> None:
    lib = native.library()
    assert lib is not None
    count = program.numel() // ctypes.sizeof(_Layer)
    layers = (_Layer * count)()
    ctypes.memmove(layers, program.data_ptr(), program.numel())
    for layer in layers:
        layer.ids = _address(ids, layer.ids)
        layer.param = _address(params, layer.param)
        layer.grad = _address(grads, layer.grad)
        for state in (layer.second, layer.first, layer.momentum):
            state.data = _address(states, state.data)
            state.columns = _address(states, state.columns)
    threads = torch.get_num_threads()
    scratch = torch.empty(lib.lightning_sketch_scratch(layers, ctypes.c_int64(count), threads), dtype=torch.uint8)
    failed = lib.lightning_sketch_step(
        layers,
        ctypes.c_int64(count),
        threads,
        native.isa(),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_void_p(native.gomp_parallel()),
    )
    assert not failed


def _address(tensors: list[Tensor], position: int | None) -> int | None:
    return tensors[position - 1].data_ptr() if position else None


def _all_finite(tensors: list[Tensor]) -> Tensor:
    lib = native.library()
    assert lib is not None
    count = len(tensors)
    found = torch.empty(count, dtype=torch.uint8)
    failed = lib.lightning_sketch_finite(
        (ctypes.c_void_p * count)(*[t.data_ptr() for t in tensors]),
        (ctypes.c_int64 * count)(*[t.numel() for t in tensors]),
        (ctypes.c_int32 * count)(*[_BFLOAT16[t.dtype] for t in tensors]),
        ctypes.c_int64(count),
        ctypes.c_void_p(found.data_ptr()),
        torch.get_num_threads(),
        native.isa(),
        ctypes.c_void_p(native.gomp_parallel()),
    )
    assert not failed
    return found.bool()


_OPERATORS = torch.library.Library("lightning_sketch", "DEF")  # type: ignore[no-untyped-call]
_SCHEMAS = (
    "fused_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] ids, Tensor(b!)[] states, Tensor program) -> ()",
    "all_finite(Tensor[] tensors) -> Tensor",
)
for schema in _SCHEMAS:
    _OPERATORS.define(schema)  # type: ignore[no-untyped-call]
_OPERATORS.impl("fused_step", _fused_step, "CPU")  # type: ignore[no-untyped-call]
_OPERATORS.impl("all_finite", _all_finite, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("lightning_sketch::fused_step", lambda params, grads, ids, states, program: None)
torch.library.register_fake("lightning_sketch::all_finite", lambda tensors: torch.empty(len(tensors), dtype=torch.bool))
