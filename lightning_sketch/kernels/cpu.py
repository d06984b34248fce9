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
from lightning_sketch.kernels.program import Words
from lightning_sketch.kernels.schema import FusedStep, KernelState, Kind

# ``State`` and ``StepArgs`` of csrc/layer.h. In place of an address there is a position in a list of tensors, from 1.
_STATE = struct.Struct("@ 4i q Q 4f 3q")
_HEAD = struct.Struct("@ 4q 4q 4i 7f i 3q")  # a layer without its three states
_LAYER_BYTES = _HEAD.size + 3 * _STATE.size
# What in them is something else at every step, and where it begins.
_STATE_STEP, _STATE_STEP_AT = struct.Struct("@ Q 4f 2q"), struct.calcsize("@ 4i q")
_HEAD_STEP, _HEAD_STEP_AT = struct.Struct("@ 4q 4i 7f i"), struct.calcsize("@ 4q")

# The same as words: numbers of 32 bits from `maximize` to `leave_out` and of every state, seeds of 64 bits.
_STATES_AT = [_HEAD.size + i * _STATE.size for i in range(3)]
_NUMBER_WORDS = [
    *range(struct.calcsize("@ 8q 2i") // 4, struct.calcsize("@ 8q 4i 7f i") // 4),
    *(at // 4 + word for at in _STATES_AT for word in range(8, 12)),
]
_SEED_WORDS = [(at + _STATE_STEP_AT) // 8 for at in _STATES_AT]

_ELEMENTWISE = (Kind.DENSE, Kind.SCALED)
_LINE = 4096  # elements
_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}


def step(layers: Sequence[FusedStep]) -> Tensor:
    """Perform the steps of all `layers`, together on torch's threads.

    Returns:
        how many rows or elements of each were left out, int64 ``[len(layers)]``.
    """
    params: list[Tensor] = []
    grads: list[Tensor] = []
    ids: list[Tensor] = []
    states: list[Tensor] = []
    packed, rows = bytearray(), []
    for number, layer in enumerate(layers):
        if layer.grad.numel() == 0:
            continue
        for part in _parts(layer):
            packed += _pack(part, number, params, grads, ids, states)
            rows.append(number)
    left_out = torch.zeros(len(layers), dtype=torch.int64, device="cpu")
    if packed:
        increment_version(params + states)  # kernels write through addresses, of which autograd knows nothing
        _launch(params, grads, ids, states, left_out, torch.frombuffer(packed, dtype=torch.uint8))
    if (cache := layers[0].cache) is not None:
        whole = not ids and rows == list(range(len(layers)))  # none is empty, in two parts, or has some rows only
        cache.program = _Program(layers, packed) if whole else None
    return left_out


def scratch_bytes(layers: Sequence[FusedStep]) -> int:
    """Bytes of temporary memory that kernels ask for in a step; tensors may be on the meta device."""
    packed = bytearray()
    for layer in layers:
        for part in _parts(layer) if layer.grad.numel() else ():
            packed += _pack(part, 0, [], [], [], [])
    if not packed:
        return 0
    lib = native.library()
    assert lib is not None
    # Nothing is read but shapes, so positions may stay where addresses belong.
    count, buffer = len(packed) // _LAYER_BYTES, (ctypes.c_char * len(packed)).from_buffer(packed)
    return int(lib.lightning_sketch_scratch(buffer, ctypes.c_int64(count), torch.get_num_threads()))


class _Program:
    """A `Program` of layers of which each is a row of words."""

    def __init__(self, layers: Sequence[FusedStep], packed: bytearray) -> None:
        self.kernel = step
        self.addresses = [layer.addresses() for layer in layers]
        self._words = Words(packed, len(layers), _NUMBER_WORDS, _SEED_WORDS)

    def follow(self, leaders: Sequence[int]) -> None:
        self._words.follow(leaders)

    def takes(self, steps: Sequence[FusedStep], grads: Sequence[Tensor]) -> bool:
        return True

    def again(
        self, steps: Sequence[FusedStep], params: list[Tensor], grads: list[Tensor], states: list[Tensor]
    ) -> Tensor:
        packed = bytearray()
        for step in steps:
            (part,) = _parts(step)
            packed += _pack(part, 0, [], [], [], [])  # positions stay as they are
        self._words.write(packed)
        left_out = torch.zeros(len(params), dtype=torch.int64, device="cpu")
        increment_version(params + states)
        _launch(params, grads, [], states, left_out, self._words.rows.view(-1).view(torch.uint8))
        return left_out


def _launch(*arguments: list[Tensor] | Tensor) -> None:
    torch.ops.lightning_sketch.fused_step(*arguments)


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

    def cut_state(state: KernelState | None) -> KernelState | None:
        return None if state is None else replace(state, data=cut(state.data))

    return replace(
        step,
        param=cut(step.param),
        grad=cut(step.grad),
        second=cut_state(step.second),
        first=cut_state(step.first),
        momentum=cut_state(step.momentum),
        cache=None,  # of the step as it was
    )


def _pack(
    step: FusedStep,
    number: int,
    params: list[Tensor],
    grads: list[Tensor],
    ids: list[Tensor],
    states: list[Tensor],
) -> bytearray:
    """The step, of the layer of that number, as a ``StepArgs``; its tensors are appended to the lists."""
    cache = step.cache if step.ids is None else None  # other rows at every step
    packed = None if cache is None else cache.packed
    if packed is None:
        packed = _layout(step)
        if cache is not None:
            cache.packed = packed
    params.append(step.param)
    grads.append(step.grad)
    if step.ids is not None:
        ids.append(step.ids)
    _HEAD_STEP.pack_into(
        packed,
        _HEAD_STEP_AT,
        0 if step.ids is None else len(ids),
        len(params),
        len(grads),
        number + 1,
        _BFLOAT16[step.param.dtype],
        step.ids is None or len(step.ids) == len(step.param),
        step.maximize,
        step.bound is not None,
        step.weight_decay,
        step.decay_factor,
        step.lr,
        step.eps,
        step.correction,
        step.bound or 0.0,
        step.nesterov,
        step.leave_out,
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
    """The step as a ``StepArgs`` without what is something else at every step."""
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
    ids: list[Tensor],
    states: list[Tensor],
    left_out: Tensor,
    program: Tensor,
) -> None:
    lib = native.library()
    assert lib is not None
    count = ctypes.c_int64(program.numel() // _LAYER_BYTES)
    tensors = [_addresses(some) for some in (params, grads, ids, states)]
    threads = torch.get_num_threads()
    layers = ctypes.create_string_buffer(program.numel())  # the operator does not change its arguments
    counts = ctypes.c_void_p(left_out.data_ptr())
    lib.lightning_sketch_resolve(ctypes.c_void_p(program.data_ptr()), count, layers, *tensors, counts)
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


_OPERATORS = torch.library.Library("lightning_sketch", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "fused_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] ids, Tensor(b!)[] states, Tensor(c!) left_out, "
    "Tensor program) -> ()"
)
_OPERATORS.impl("fused_step", _fused_step, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("lightning_sketch::fused_step", lambda params, grads, ids, states, left_out, program: None)
