"""Fused steps on the CPU: torch operators over the compiled library."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_sketch.kernels import native
from lightning_sketch.kernels.fields import STATE, STATES, STEP, Kind, Source, offset, part, state_offset, step_size
from lightning_sketch.kernels.program import Words
from lightning_sketch.kernels.schema import FusedStep, KernelState, Observed, state_numbers, step_numbers

# Of `fields`. In place of an address there is a position in a list of tensors, from 1.
_HEAD, _HEAD_AT = part(STEP, Source.LAYOUT)
_HEAD_STEP, _HEAD_STEP_AT = part(STEP, Source.STEP)
_STATE, _ = part(STATE, Source.LAYOUT)
_STATE_STEP, _STATE_STEP_AT = part(STATE, Source.STEP)
_LAYER_BYTES = step_size()

# What is another number at every step: words of 32 bits, and seeds of 64 bits.
_STATES_AT = [state_offset(number) for number in range(len(STATES))]
_NUMBER_WORDS = [
    (start + offset(fields, field.name)) // 4
    for start, fields in ((0, STEP), *((at, STATE) for at in _STATES_AT))
    for field in fields
    if field.source == Source.STEP and field.code in "if"
]
_SEED_WORDS = [(at + offset(STATE, "seed")) // 8 for at in _STATES_AT]

_ELEMENTWISE = (Kind.DENSE, Kind.SCALED)
_LINE = 4096  # elements


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
        for lines in _parts(layer):
            packed += _pack(lines, number, params, grads, ids, states)
            rows.append(number)
    left_out = torch.zeros(len(layers), dtype=torch.int64, device="cpu")
    if packed:
        increment_version(params + states)  # kernels write through addresses, of which autograd knows nothing
        _launch(params, grads, ids, states, left_out, torch.frombuffer(packed, dtype=torch.uint8))
    if (cache := layers[0].cache) is not None:
        whole = not ids and rows == list(range(len(layers)))  # none is empty, in two parts, or has some rows only
        cache.program = _Program(layers, packed) if whole else None
    return left_out


def observe_gradients(layers: Sequence[FusedStep]) -> list[Observed]:
    """What the gradients of all `layers` add to sums of rows and columns; see `schema.observation`."""
    found: list[Observed] = []
    params: list[Tensor] = []
    grads: list[Tensor] = []
    ids: list[Tensor] = []
    states: list[Tensor] = []
    packed = bytearray()
    for number, layer in enumerate(layers):
        assert layer.second is not None
        made = Observed(
            torch.empty(layer.grad.shape[0], dtype=torch.float32, device="cpu"),
            torch.zeros(layer.grad.shape[1:].numel(), dtype=torch.float32, device="cpu")
            if layer.second.kind == Kind.FACTORED
            else None,
        )
        found.append(made)
        if layer.grad.numel():
            into = replace(layer, second=replace(layer.second, data=made.means, columns=made.columns))
            packed += _pack(into, number, params, grads, ids, states)
        else:
            made.means.zero_()
    if packed:
        left_out = torch.zeros(len(layers), dtype=torch.int64, device="cpu")
        program = torch.frombuffer(packed, dtype=torch.uint8)
        torch.ops.lightning_sketch.observe(params, grads, ids, states, left_out, program)
    return found


def scratch_bytes(layers: Sequence[FusedStep]) -> int:
    """Bytes of temporary memory that kernels ask for in a step; tensors may be on the meta device."""
    packed = bytearray()
    for layer in layers:
        for lines in _parts(layer) if layer.grad.numel() else ():
            packed += _pack(lines, 0, [], [], [], [])
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
            (lines,) = _parts(step)
            packed += _pack(lines, 0, [], [], [], [])  # positions stay as they are
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
    packed = bytearray(_LAYER_BYTES)
    _HEAD.pack_into(packed, _HEAD_AT, step.row_offset, step.column_offset)
    params.append(step.param)
    grads.append(step.grad)
    if step.ids is not None:
        ids.append(step.ids)
    position = 0 if step.ids is None else len(ids)
    _HEAD_STEP.pack_into(packed, _HEAD_STEP_AT, len(params), len(grads), position, number + 1, *step_numbers(step))
    for at, stored in zip(_STATES_AT, (step.second, step.first, step.momentum), strict=True):
        if stored is None:
            continue
        states.append(stored.data)
        data = len(states)
        if stored.columns is not None:
            states.append(stored.columns)
        columns = 0 if stored.columns is None else len(states)
        _STATE.pack_into(packed, at, stored.kind, stored.dtype, stored.is_signed, stored.depth)
        _STATE_STEP.pack_into(packed, at + _STATE_STEP_AT, data, columns, *state_numbers(stored))
    return packed


def _fused_step(
    params: list[Tensor],
    grads: list[Tensor],
    ids: list[Tensor],
    states: list[Tensor],
    left_out: Tensor,
    program: Tensor,
    observe: bool = False,
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
    work = lib.lightning_sketch_observe if observe else lib.lightning_sketch_step
    failed = work(
        layers,
        count,
        threads,
        native.isa(),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_void_p(native.gomp_parallel()),
    )
    if failed:
        raise RuntimeError(f"the compiled kernels refused a step: {_FAILURES[failed]}")


#: What `lightning_sketch_step` says.
_FAILURES = {1: "they are not compiled for this instruction set", 2: "a state is stored in a way that they do not know"}


def _addresses(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


_OPERATORS = torch.library.Library("lightning_sketch", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "fused_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] ids, Tensor(b!)[] states, Tensor(c!) left_out, "
    "Tensor program) -> ()"
)
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "observe(Tensor[] params, Tensor[] grads, Tensor[] ids, Tensor(a!)[] states, Tensor(b!) left_out, "
    "Tensor program) -> ()"
)
_OPERATORS.impl("fused_step", _fused_step, "CPU")  # type: ignore[no-untyped-call]
_OPERATORS.impl("observe", functools.partial(_fused_step, observe=True), "CPU")  # type: ignore[no-untyped-call]
for _name in ("fused_step", "observe"):
    torch.library.register_fake(
        f"lightning_sketch::{_name}", lambda params, grads, ids, states, left_out, program: None
    )
