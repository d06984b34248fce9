"""A step of all layers that is made again: what stays the same from step to step is compared, and not said anew.

Compared is what codecs and kernels go by: of every layer the parameter and its gradient, where its states lie and how,
the step count and the scales. While nothing of it is another, a step takes the gradients, begins the states of the
layers that lead (`kernels.program`), and lets the counts and scales of the others follow. Anything else is for a step
that looks at everything (`step.pending_updates`); after it steps are prepared again.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from lightning_sketch import kernels
from lightning_sketch.kernels.capture import capturing
from lightning_sketch.kernels.program import Program
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.layers.record import RECORDS
from lightning_sketch.layers.step_count import step_tensor
from lightning_sketch.optimizer.bound import PendingUpdate
from lightning_sketch.optimizer.on_device import asked
from lightning_sketch.rules import UpdateRule

_CELLS: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class Prepared:
    """A step of all of an optimizer's layers that have a gradient, ready to be made again.

    Attributes:
        tensors: the optimizer's tensors; they have their gradients from `take_gradients` to `step`.
        units: of what steps leave out, see `nonfinite.Unit`.
        valid: whether it can be used again.
    """

    def __init__(self, optimizer: Optimizer, tensors: list[PendingUpdate], program: Program, bound: int) -> None:
        layers = [_Layer(own, addresses) for own, addresses in zip(tensors, program.addresses, strict=True)]
        leaders: dict[Any, int] = {}
        led_by = [leaders.setdefault(layer.kind(), i) for i, layer in enumerate(layers)]
        for layer, leader in zip(layers, led_by, strict=True):
            layer.leader = layers[leader]
        program.follow(led_by)
        self.tensors, self.units = tensors, [layer.bound.unit for layer in layers]
        self._layers, self._program = layers, program
        self._leaders = [layers[i] for i in leaders.values()]
        self._followers = [layer for layer in layers if layer.leader is not layer]
        self._params = [layer.param for layer in layers]
        self._counted = [number for layer in self._followers for _, number, *_ in layer.numbers]
        self._device, self._kernel = layers[0].param.device, program.kernel
        with_gradient = {id(layer.param): layer for layer in reversed(layers)}
        self._groups: list[tuple[Any, ...]] = []
        self._idle: list[tuple[Tensor, Any]] = []  # compressed, but without a gradient
        for group in optimizer.param_groups:
            params, records = list(group["params"]), list(group[RECORDS])
            ours = [param for param, record in zip(params, records, strict=True) if record is not None]
            stepped = [with_gradient[id(param)] for param in ours if id(param) in with_gradient]
            self._idle += [(param, optimizer.state.get(param)) for param in ours if id(param) not in with_gradient]
            first = (stepped[0].own.parts[0].layer.fqn, stepped[0].own.needed) if stepped else None
            self._groups.append((group, params, records, asked(group), first))
        self.valid = bound <= len(layers) + sum(state is not None for _, state in self._idle)
        self._grads: list[Tensor] = []
        self._states: list[Tensor] = []
        for own in tensors:
            own.gradients = []
            del own.grad

    @classmethod
    def make(cls, optimizer: Optimizer, tensors: list[PendingUpdate], *, bound: int) -> Prepared | None:
        """The step that was just made of `tensors`, or ``None`` if it cannot be made again by what is compared here.

        Args:
            bound: how many tensors are bound. Some may be in no group any more, which only other steps look at.
        """
        parts = tensors[0].bound
        program = None if not parts else parts[0].cache.program
        if program is None or len(program.addresses) != len(tensors) or not all(map(_can_repeat, tensors)):
            return None
        if program.kernel is not kernels.fused_kernel(tensors[0].param.device):  # somebody wrapped it
            return None
        try:
            made = cls(optimizer, tensors, program, bound)
        except KeyError:  # an entry of a state that the kernel does not use, or a group without records
            return None
        return made if made.valid else None

    def take_gradients(self, rule: UpdateRule, optimizer: Optimizer) -> bool:
        """Whether everything is as it was; then `tensors` have the gradients of now. Changes nothing.

        Raises:
            ValueError: the rule does not take a group's hyperparameters.
        """
        groups, states = optimizer.param_groups, optimizer.state
        if capturing() or len(groups) != len(self._groups) or kernels.fused_kernel(self._device) is not self._kernel:
            return False
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            return False
        for group, (known, params, records, options, first) in zip(groups, self._groups, strict=True):
            if group is not known or group.get(RECORDS) != records or not _same(group["params"], params):
                return False
            if first is not None:
                rule.check(group, first[0])
                if asked(group) != options or {state.name for state in rule.states(group)} != first[1]:
                    return False
        return all(
            param.grad is None and states.get(param) is state for param, state in self._idle
        ) and self._take_gradients(states)

    def _take_gradients(self, states: Mapping[Tensor, Any]) -> bool:
        grads: list[Tensor] = []
        stored: list[Tensor] = []
        strided = torch.strided
        for layer in self._layers:
            param, state, shape, dtype = layer.param, layer.state, layer.shape, layer.dtype
            grad = param.grad
            if type(grad) is not Tensor or grad.layout is not strided or not grad.is_contiguous():
                return False
            if grad.dtype is not dtype or grad.shape != shape or param.dtype is not dtype or param.shape != shape:
                return False
            if param.data_ptr() != layer.address or not param.is_contiguous() or states.get(param) is not state:
                return False
            if len(state) != layer.entries:
                return False
            for key, address, its_shape, its_dtype in layer.stored:
                x = state.get(key)
                if type(x) is not Tensor or x.data_ptr() != address or x.shape != its_shape:
                    return False
                if x.dtype is not its_dtype or not x.is_contiguous():
                    return False
                stored.append(x)
            for (key, number, address, cell), (*_, leading) in zip(layer.numbers, layer.leader.numbers):  # noqa: B905
                if state.get(key) is not number or number.data_ptr() != address or cell.value != leading.value:
                    return False
                if not cell.value:  # overwritten, for the other step to say
                    return False
            grads.append(grad)
        for layer, grad in zip(self._layers, grads):  # noqa: B905
            layer.own.grad = grad
        self._grads, self._states = grads, stored
        return True

    def step(self, rule: UpdateRule, *, leave_out: bool) -> Tensor:
        """Make the step (parameters and states are modified in place).

        Returns:
            what `rules.run` does.
        """
        try:
            return self._step(rule, leave_out)
        finally:  # memory of gradients is free after the step, and that of states as soon as they are moved away
            self._grads, self._states = [], []
            for own in self.tensors:
                del own.grad

    def _step(self, rule: UpdateRule, leave_out: bool) -> Tensor:
        grads, states = self._grads, self._states
        begun = [layer.numbers_of(rule) for layer in self._leaders]  # all of them before anything changes
        _count(self._leaders)
        steps = [layer.fuse(rule, of_step, leave_out) for layer, of_step in zip(self._leaders, begun, strict=True)]
        if not self._program.takes(steps, grads):  # they are laid out otherwise, or hyperparameters ask for other code
            self.valid = False
            of_leader = dict(zip(self._leaders, zip(steps, begun, strict=True), strict=True))
            _count(self._followers)
            every = [
                of_leader[layer][0] if layer in of_leader else layer.fuse(rule, of_leader[layer.leader][1], leave_out)
                for layer in self._layers
            ]
            return self._kernel(every)
        renormalized = {
            layer for layer in self._leaders if any(state.renormalized for state in layer.bound.states.values())
        }
        for layer in self._followers:
            if layer.leader in renormalized:
                for name, state in layer.bound.states.items():
                    state.follow(layer.leader.bound.states[name])
            for (*_, cell), (*_, leading) in zip(layer.numbers, layer.leader.numbers):  # noqa: B905
                cell.value = leading.value
        if self._counted:
            increment_version(self._counted)
        return self._program.again(steps, self._params, grads, states)


class _Layer:
    """A layer, and what of it must stay as it was."""

    # fmt: off
    __slots__ = (
        "address", "bound", "dtype", "entries", "leader", "numbers", "own", "param", "shape", "state", "stored",
    )
    # fmt: on

    def __init__(self, own: PendingUpdate, addresses: Sequence[int]) -> None:
        assert own.bound is not None
        (self.bound,) = own.bound
        self.own, self.param, self.state, self.entries, self.leader = own, own.param, own.state, len(own.state), self
        self.address, self.shape, self.dtype = own.param.data_ptr(), own.param.shape, own.param.dtype
        if self.address != addresses[0]:
            raise KeyError("another step's program")
        numbers = [(key, x) for key, x in own.state.items() if _is_number(key)]
        # Read and written through their addresses: through torch it takes ten times as long.
        self.numbers = [(key, x, x.data_ptr(), _CELLS[x.dtype].from_address(x.data_ptr())) for key, x in numbers]
        others = {x.data_ptr(): (key, x) for key, x in own.state.items() if not _is_number(key)}
        found = [(address, *others.pop(address)) for address in addresses[1:]]
        self.stored = [(key, address, x.shape, x.dtype) for address, key, x in found]
        if others or len(self.numbers) + len(self.stored) != self.entries:
            raise KeyError("a state that the step does not use")

    def kind(self) -> Any:
        """What is the same of layers that may follow each other: then their numbers are."""
        part = self.own.parts[0]
        states = tuple((name, state.spec.alike()) for name, state in self.bound.states.items())
        values = tuple(cell.value for *_, cell in self.numbers)
        return id(self.own.group), part.shard, self.dtype, tuple(part.layer.codecs.items()), states, values

    def numbers_of(self, rule: UpdateRule) -> tuple[Any, int, bool]:
        """Of its next step `UpdateRule.numbers`, the step's number, and whether to maximize."""
        group, step = self.own.group, int(self.state["step"].item()) + 1
        return rule.numbers(group, step), step, bool(group.get("maximize", False))

    def fuse(self, rule: UpdateRule, of_step: tuple[Any, int, bool], leave_out: bool) -> FusedStep:
        """Begin its step."""
        numbers, step, maximize = of_step
        assert self.own.grad is not None
        gradient = self.own.parts[0].gradient(self.own.grad)
        return rule.fuse(self.bound.step(gradient, numbers, step, maximize=maximize, leave_out=leave_out))


def _is_number(key: str) -> bool:
    return key == "step" or key.endswith("_scale")


def _can_repeat(own: PendingUpdate) -> bool:
    """Whether a step of the tensor was one of whole tensors, with numbers on the host, by states that can follow."""
    if own.on_device or own.scale is not None or len(own.parts) != 1 or type(own.param) not in (Tensor, nn.Parameter):
        return False
    part, bound = own.parts[0], own.bound[0] if own.bound else None
    return (
        bound is not None
        and not bound.lazy
        and bound.momentum is None
        and part.span is None
        and own.gradients[0].rows is None
        and all(state.can_follow for state in bound.states.values())
        and not any(codec.needs_host for codec in part.layer.codecs.values())
        and all(type(x) is Tensor for x in own.state.values())
        and all(x.is_cpu and x.ndim == 0 and x.dtype in _CELLS for key, x in own.state.items() if _is_number(key))
    )


def _count(layers: Sequence[_Layer]) -> None:
    if layers:
        torch._foreach_add_([layer.state["step"] for layer in layers], [step_tensor(1.0)] * len(layers))


def _same(found: Sequence[Any], known: Sequence[Any]) -> bool:
    return len(found) == len(known) and all(map(operator.is_, found, known))
