"""Fused steps as one torch operator: tensors in lists, everything else as numbers.

Not an implementation for CUDA of the CPU's operator, whose program is a C struct in bytes: integers and floats go
through a schema as they are, and the two operators can be loaded without each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_sketch.kernels.fused import FusedStep, Kind, Stored
from lightning_sketch.kernels.triton.launch import perform, signed


def step(layers: Sequence[FusedStep]) -> Tensor:
    """Perform the steps of all `layers` (their parameters and states modified in place)."""
    program = Program()
    for layer in layers:
        program.add(layer)
    if program.params:
        # Kernels write through addresses, of which autograd knows nothing.
        increment_version(program.params + program.states)
        _launch(*program.arguments())
    device = layers[0].param.device if layers else None
    return torch.zeros(len(layers), dtype=torch.int64, device=device)  # nothing is left out yet


@dataclass
class Program:
    """Steps as the operator's arguments.

    Args:
        params, grads, ids, states: the tensors of all steps, in order; what a step lacks is absent.
        integers, numbers: the fields of all steps, in the order that `add` and `steps` share.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int], list[float]]:
        return self.params, self.grads, self.ids, self.states, self.integers, self.numbers

    def add(self, step: FusedStep) -> None:
        """Append a step; one without elements has nothing to do."""
        if step.grad.numel() == 0:
            return
        self.params.append(step.param)
        self.grads.append(step.grad)
        if step.ids is not None:
            self.ids.append(step.ids)
        self.integers += [
            step.ids is not None,
            step.row_offset,
            step.column_offset,
            step.bound is not None,
            step.negate,
        ]
        self.numbers += [step.lr, step.shrink, step.eps, step.weight_decay, step.correction]
        self.numbers += [step.bound or 0.0, step.nesterov]
        for stored in (step.second, step.first, step.momentum):
            self._add_state(stored)

    def _add_state(self, stored: Stored | None) -> None:
        if stored is None:
            self.integers.append(Kind.NONE)
            return
        self.states.append(stored.data)
        if stored.columns is not None:
            self.states.append(stored.columns)
        self.integers += [stored.kind, stored.columns is not None, stored.signed, stored.depth, stored.width]
        self.integers.append(signed(stored.seed))
        self.numbers += [stored.decay, stored.weight, stored.column_weight, stored.scale]

    def steps(self) -> Iterator[FusedStep]:
        """The steps again."""
        ids, states = iter(self.ids), iter(self.states)
        integers, numbers = iter(self.integers), iter(self.numbers)

        def state() -> Stored | None:
            kind = Kind(next(integers))
            if kind == Kind.NONE:
                return None
            data = next(states)
            columns = next(states) if next(integers) else None
            flag, depth, width, seed = bool(next(integers)), next(integers), next(integers), next(integers)
            decay, weight, column_weight, scale = (next(numbers) for _ in range(4))
            return Stored(kind, data, columns, decay, weight, column_weight, scale, flag, depth, width, seed)

        for param, grad in zip(self.params, self.grads, strict=True):
            rows = next(ids) if next(integers) else None
            row_offset, column_offset = next(integers), next(integers)
            bounded, negate = bool(next(integers)), bool(next(integers))
            lr, shrink, eps, weight_decay, correction, bound, nesterov = (next(numbers) for _ in range(7))
            yield FusedStep(
                param=param,
                grad=grad,
                ids=rows,
                row_offset=row_offset,
                column_offset=column_offset,
                second=state(),
                first=state(),
                momentum=state(),
                lr=lr,
                shrink=shrink,
                eps=eps,
                weight_decay=weight_decay,
                correction=correction,
                bound=bound if bounded else None,
                nesterov=nesterov,
                negate=negate,
            )


def _launch(
    params: list[Tensor],
    grads: list[Tensor],
    ids: list[Tensor],
    states: list[Tensor],
    integers: list[int],
    numbers: list[float],
) -> None:
    torch.ops.lightning_sketch.triton_step(params, grads, ids, states, integers, numbers)


def _triton_step(
    params: list[Tensor],
    grads: list[Tensor],
    ids: list[Tensor],
    states: list[Tensor],
    integers: list[int],
    numbers: list[float],
) -> None:
    for layer in Program(params, grads, ids, states, integers, numbers).steps():
        perform(layer)


_OPERATORS = torch.library.Library("lightning_sketch", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "triton_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] ids, Tensor(b!)[] states, "
    "int[] integers, float[] numbers) -> ()"
)
_OPERATORS.impl("triton_step", _triton_step, "CUDA")  # type: ignore[no-untyped-call]
# On CPU tensors in Triton's interpreter, for tests; without it Triton itself says that there is no device.
_OPERATORS.impl("triton_step", _triton_step, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("lightning_sketch::triton_step", lambda params, grads, ids, states, integers, numbers: None)
