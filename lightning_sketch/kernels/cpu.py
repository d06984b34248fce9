"""Fused steps on the CPU: torch operators over the compiled library."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.kernels import native
from lightning_sketch.kernels.fused import FusedStep, Kind, Stored

# ``State`` and ``Layer`` of csrc/layer.h. In place of an address there is a position in a list of tensors, from 1.
_STATE = struct.Struct("@ 4i q Q 4f 3q")
_HEAD = struct.Struct("@ 4q 3q 4i 7f i q")  # a layer without its three states
_LAYER_BYTES = _HEAD.size + 3 * _STATE.size
_NO_STATE = bytes(_STATE.size)

_ELEMENTWISE = (Kind.DENSE, Kind.SCALED)
_LINE = 4096  # elements
_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}


def step(layers: Sequence[FusedStep]) -> None:
    """Perform the steps of all `layers`, together on torch's threads."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    ids: list[Tensor] = []
    states: list[Tensor] = []
    packed = bytearray()
    for layer in layers:
        if layer.grad.numel() == 0:
            continue
        for part in _parts(layer):
            packed += _pack(part, params, grads, ids, states)
    if packed:
        _launch(params, grads, ids, states, torch.frombuffer(packed, dtype=torch.uint8))


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
    if layer.ids is not None:
        return [layer]
    for state in (layer.second, layer.first, layer.momentum):
        if state is not None and state.kind not in _ELEMENTWISE:
            return [layer]
    numel = layer.grad.numel()
    if numel // layer.grad.shape[0] >= _LINE:
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


def _pack(step: FusedStep, params: list[Tensor], grads: list[Tensor], ids: list[Tensor], states: list[Tensor]) -> bytes:
    """The step as a ``Layer``; its tensors are appended to the lists."""
    rows = step.grad.shape[0]
    head = _HEAD.pack(
        rows,
        step.grad.numel() // rows,
        step.row_offset,
        step.column_offset,
        _append(ids, step.ids),
        _append(params, step.param),
        _append(grads, step.grad),
        _BFLOAT16[step.param.dtype],
        rows == step.param.shape[0],
        step.negate,
        step.bound is not None,
        step.weight_decay,
        step.shrink,
        step.lr,
        step.eps,
        step.correction,
        step.bound or 0.0,
        step.nesterov,
        0,
        0,
    )
    return b"".join((head, *(_pack_state(state, states) for state in (step.second, step.first, step.momentum))))


def _pack_state(stored: Stored | None, states: list[Tensor]) -> bytes:
    if stored is None:
        return _NO_STATE
    return _STATE.pack(
        stored.kind,
        _BFLOAT16[stored.data.dtype],
        stored.signed,
        stored.depth,
        stored.width,
        stored.seed & (1 << 64) - 1,
        stored.decay,
        stored.weight,
        stored.column_weight,
        stored.scale,
        _append(states, stored.data),
        _append(states, stored.columns),
        0,
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
    count = ctypes.c_int64(program.numel() // _LAYER_BYTES)
    tensors = [_addresses(some) for some in (params, grads, ids, states)]
    threads = torch.get_num_threads()
    layers = ctypes.create_string_buffer(program.numel())  # the operator does not change its arguments
    lib.lightning_sketch_resolve(ctypes.c_void_p(program.data_ptr()), count, layers, *tensors)
    scratch = torch.empty(lib.lightning_sketch_scratch(layers, count, threads), dtype=torch.uint8)
    failed = lib.lightning_sketch_step(
        layers,
        count,
        threads,
        native.isa(),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_void_p(native.gomp_parallel()),
    )
    assert not failed


def _addresses(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _all_finite(tensors: list[Tensor]) -> Tensor:
    lib = native.library()
    assert lib is not None
    count = len(tensors)
    found = torch.empty(count, dtype=torch.uint8)
    failed = lib.lightning_sketch_finite(
        _addresses(tensors),
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
