"""Fused steps on the CPU: torch operators over the compiled library."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_sketch.kernels import native
from lightning_sketch.kernels.fused import FusedStep, Kind, Stored

# ``State`` and ``Layer`` of csrc/layer.h. In place of an address there is a position in a list of tensors, from 1.
_STATE = struct.Struct("@ 4i q Q 4f 3q")
_HEAD = struct.Struct("@ 4q 4q 4i 7f i q")  # a layer without its three states
_LAYER_BYTES = _HEAD.size + 3 * _STATE.size
# What in them is something else at every step, and where it begins.
_STATE_STEP, _STATE_STEP_AT = struct.Struct("@ Q 4f 2q"), struct.calcsize("@ 4i q")
_HEAD_STEP, _HEAD_STEP_AT = struct.Struct("@ 4q 4i 7f"), struct.calcsize("@ 4q")

_ELEMENTWISE = (Kind.DENSE, Kind.SCALED)
_LINE = 4096  # elements
_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}


def step(layers: Sequence[FusedStep]) -> None:
    """Perform the steps of all `layers`, together on torch's threads."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    sums: list[Tensor] = []
    ids: list[Tensor] = []
    states: list[Tensor] = []
    packed = bytearray()
    for layer in layers:
        if layer.grad.numel() == 0:
            continue
        for part in _parts(layer):
            packed += _pack(part, params, grads, sums, ids, states)
    if packed:
        increment_version(params + states)  # kernels write through addresses, of which autograd knows nothing
        _launch(params, grads, sums, ids, states, torch.frombuffer(packed, dtype=torch.uint8))


def _launch(*arguments: list[Tensor] | Tensor) -> None:
    torch.ops.lightning_sketch.fused_step(*arguments)


def all_finite(tensors: list[Tensor], wanted: Sequence[Kind]) -> tuple[list[bool], list[Tensor | None]]:
    """What `kernels.all_finite` says, of contiguous tensors of float32 or bfloat16."""
    sums: list[Tensor | None] = [None] * len(tensors)
    made: list[Tensor] = []
    of: list[int] = []
    for i, (tensor, kind) in enumerate(zip(tensors, wanted, strict=True)):
        if kind != Kind.NONE and (numel := tensor.numel()):
            count = _sums_numel(tensor.shape[0], numel // tensor.shape[0], kind)
            sums[i] = own = torch.empty(count, dtype=torch.float32, device="cpu")
            made.append(own)
            of.append(i)
    found: Tensor = torch.ops.lightning_sketch.all_finite(tensors, made, of, [int(wanted[i]) for i in of])
    return [bool(x) for x in found.tolist()], sums


def _sums_numel(rows: int, columns: int, kind: Kind) -> int:
    lib = native.library()
    assert lib is not None
    numel: int = lib.lightning_sketch_sums(ctypes.c_int64(rows), ctypes.c_int64(columns), kind)
    return numel


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
        kept=None,  # of the step as it was
    )


def _pack(
    step: FusedStep,
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    ids: list[Tensor],
    states: list[Tensor],
) -> bytearray:
    """The step as a ``Layer``; its tensors are appended to the lists."""
    kept = step.kept if step.ids is None else None  # other rows at every step
    packed = None if kept is None else kept.packed
    if packed is None:
        packed = _layout(step)
        if kept is not None:
            kept.packed = packed
    params.append(step.param)
    grads.append(step.grad)
    if step.ids is not None:
        ids.append(step.ids)
    if step.sums is not None:
        sums.append(step.sums)
    _HEAD_STEP.pack_into(
        packed,
        _HEAD_STEP_AT,
        0 if step.ids is None else len(ids),
        len(params),
        len(grads),
        0 if step.sums is None else len(sums),
        _BFLOAT16[step.param.dtype],
        step.ids is None or len(step.ids) == len(step.param),
        step.negate,
        step.bound is not None,
        step.weight_decay,
        step.shrink,
        step.lr,
        step.eps,
        step.correction,
        step.bound or 0.0,
        step.nesterov,
    )
    at = _HEAD.size + _STATE_STEP_AT
    for stored in (step.second, step.first, step.momentum):
        if stored is not None:
            states.append(stored.data)
            data = len(states)
            if stored.columns is not None:
                states.append(stored.columns)
            _STATE_STEP.pack_into(
                packed,
                at,
                stored.seed & (1 << 64) - 1,
                stored.decay,
                stored.weight,
                stored.column_weight,
                stored.scale,
                data,
                0 if stored.columns is None else len(states),
            )
        at += _STATE.size
    return packed


def _layout(step: FusedStep) -> bytearray:
    """The step as a ``Layer`` without what is something else at every step."""
    rows = step.grad.shape[0]
    packed = bytearray(_HEAD.size)
    struct.pack_into("@ 4q", packed, 0, rows, step.grad.numel() // rows, step.row_offset, step.column_offset)
    for stored in (step.second, step.first, step.momentum):
        state = bytearray(_STATE.size)
        if stored is not None:
            dtype = _BFLOAT16.get(stored.data.dtype, 0)  # codes are integers
            struct.pack_into("@ 4i q", state, 0, stored.kind, dtype, stored.signed, stored.depth, stored.width)
        packed += state
    return packed


def _fused_step(
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    ids: list[Tensor],
    states: list[Tensor],
    program: Tensor,
) -> None:
    lib = native.library()
    assert lib is not None
    count = ctypes.c_int64(program.numel() // _LAYER_BYTES)
    tensors = [_addresses(some) for some in (params, grads, sums, ids, states)]
    threads = torch.get_num_threads()
    layers = ctypes.create_string_buffer(program.numel())  # the operator does not change its arguments
    lib.lightning_sketch_resolve(ctypes.c_void_p(program.data_ptr()), count, layers, *tensors)
    scratch = torch.empty(lib.lightning_sketch_scratch(layers, count, threads), dtype=torch.uint8, device="cpu")
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


def _all_finite(tensors: list[Tensor], sums: list[Tensor], of: list[int], kinds: list[int]) -> Tensor:
    lib = native.library()
    assert lib is not None
    count = len(tensors)
    addresses, rows, sums_for = (ctypes.c_void_p * count)(), (ctypes.c_int64 * count)(), (ctypes.c_int32 * count)()
    for i, made, kind in zip(of, sums, kinds, strict=True):
        addresses[i], rows[i], sums_for[i] = made.data_ptr(), tensors[i].shape[0], kind
    found = torch.empty(count, dtype=torch.uint8, device="cpu")
    failed = lib.lightning_sketch_finite(
        _addresses(tensors),
        (ctypes.c_int64 * count)(*[t.numel() for t in tensors]),
        (ctypes.c_int32 * count)(*[_BFLOAT16[t.dtype] for t in tensors]),
        ctypes.c_int64(count),
        addresses,
        rows,
        sums_for,
        ctypes.c_void_p(found.data_ptr()),
        torch.get_num_threads(),
        native.isa(),
        ctypes.c_void_p(native.gomp_parallel()),
    )
    assert not failed
    return found.bool()


_OPERATORS = torch.library.Library("lightning_sketch", "DEF")  # type: ignore[no-untyped-call]
_SCHEMAS = (
    "fused_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] sums, Tensor[] ids, Tensor(b!)[] states, Tensor program)"
    " -> ()",
    "all_finite(Tensor[] tensors, Tensor(a!)[] sums, int[] of, int[] kinds) -> Tensor",
)
for schema in _SCHEMAS:
    _OPERATORS.define(schema)  # type: ignore[no-untyped-call]
_OPERATORS.impl("fused_step", _fused_step, "CPU")  # type: ignore[no-untyped-call]
_OPERATORS.impl("all_finite", _all_finite, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("lightning_sketch::fused_step", lambda params, grads, sums, ids, states, program: None)
torch.library.register_fake(
    "lightning_sketch::all_finite", lambda tensors, sums, of, kinds: torch.empty(len(tensors), dtype=torch.bool)
)
