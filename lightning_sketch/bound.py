"""What the steps of a tensor need beside its gradient, kept from one step to the next.

To find a layer's states, and to bind its codecs to them, takes longer than the step of a small layer. So it is done
once, and again whenever what was bound is another object: the parameter, a tensor of ``optimizer.state[param]``
(``load_state_dict``, offloading), its shape, or the parameter's dtype (``module.to()``). Of memory only views are asked
whether it is still the same (flat tensors, DTensors). That is compared at every step. Numbers are not kept:
hyperparameters come from the group and scales from the state at every step, and kernels are given tensors, never
addresses of an earlier step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import SM3, CodecState
from lightning_sketch.gradient import RowGradient
from lightning_sketch.layer import LayerShard, compute_dtype
from lightning_sketch.rules import LayerStep
from lightning_sketch.sharding import local


@dataclass(slots=True)
class BoundPart:
    """A part of a layer, bound to its rows of a tensor and to its states.

    Args:
        param: its rows of the tensor, ``[local_rows, *row_shape]``.
        states: codec states by torch's name; a dropped state is absent.
        momentum: SM3's EMA of the update, if the codec has one.
        momentum_beta: the factor of that EMA.
        lazy: whether all-zero rows of a gradient count as absent.
        dtype: dtype of arithmetic.
    """

    param: Tensor
    states: Mapping[str, CodecState]
    momentum: CodecState | None
    momentum_beta: float
    lazy: bool
    dtype: torch.dtype

    @classmethod
    def bind(cls, part: LayerShard, param: Tensor, group: Mapping[str, Any], tensors: dict[str, Any]) -> BoundPart:
        """Bind `part` to the optimizer's `param` and its ``optimizer.state[param]``, which is allocated."""
        states: dict[str, CodecState] = {}
        momentum, momentum_beta = None, 0.0
        for state, codec in part.layer.stored().items():
            spec = part.spec(state, param, group)
            states[state] = codec.bind(spec, tensors)
            if isinstance(codec, SM3):
                momentum, momentum_beta = codec.bind_momentum(spec, tensors), codec.momentum
        return cls(part.rows(param), states, momentum, momentum_beta, part.layer.lazy, compute_dtype(param))

    def step(self, gradient: RowGradient, numbers: Any, step: int, *, negate: bool) -> LayerStep:
        """One step, to be run (it modifies the parameter and its states in place).

        Args:
            gradient: of this part.
            numbers: hyperparameters of this step, from `UpdateRule.numbers`.
            step: number of this step, from 1.
            negate: maximize.
        """
        return LayerStep(
            param=self.param,
            gradient=gradient.touched_only() if self.lazy else gradient,
            states=self.states,
            momentum=self.momentum,
            momentum_beta=self.momentum_beta,
            numbers=numbers,
            step=step,
            dtype=self.dtype,
            negate=negate,
        )


@dataclass(slots=True)
class OwnTensor:
    """A tensor with a gradient that our rules step.

    Args:
        group: its parameter group.
        param: the tensor.
        grad: its gradient, which torch's step does not see.
        parts: what lies in it.
        needed: states that the group's hyperparameters ask for.
        state: ``optimizer.state[param]``, empty before the first step.
        bound: the parts, bound; ``None`` if they have yet to be.
        gradients: of each part.
    """

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    parts: tuple[LayerShard, ...]
    needed: set[str]
    state: dict[str, Any]
    bound: list[BoundPart] | None
    gradients: list[RowGradient]


class Bindings:
    """The bound parts of an optimizer's tensors. Neither copied nor pickled: another optimizer makes its own."""

    def __init__(self) -> None:
        self._kept: dict[int, _Binding] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Let go of everything; tensors are bound anew."""
        self._kept.clear()

    def keep_those_in(self, states: Mapping[Tensor, Any]) -> None:
        """Let go of tensors without a state: of layers that are gone, or whose states were dropped."""
        for key in [key for key, binding in self._kept.items() if binding.param not in states]:
            del self._kept[key]

    def find(
        self, param: Tensor, parts: Sequence[LayerShard], needed: Collection[str], tensors: Mapping[str, Any]
    ) -> list[BoundPart] | None:
        """The parts of `param` that `bind` bound to just these, or ``None`` if something is not what it was."""
        kept = self._kept.get(id(param))
        return kept.bound if kept is not None and kept.holds(param, parts, needed, tensors) else None

    def bind(
        self,
        param: Tensor,
        parts: Sequence[LayerShard],
        needed: Collection[str],
        group: Mapping[str, Any],
        tensors: dict[str, Any],
    ) -> list[BoundPart]:
        """Bind the parts of `param` to it and to its states.

        Args:
            needed: the states that hyperparameters ask for, which all parts have.
            tensors: ``optimizer.state[param]``.
        """
        bound = [BoundPart.bind(part, param, group, tensors) for part in parts]
        # On other devices launching kernels takes longer, and memory must be free as soon as states are moved away.
        if param.device.type == "cpu":
            self._kept[id(param)] = _Binding(param, parts, needed, tensors, bound)
        return bound


class _Binding:
    """Bound parts of one tensor, and what they were bound to."""

    __slots__ = ("_dtype", "_needed", "_parts", "_shape", "_states", "_stride", "_tensors", "_views", "bound", "param")

    def __init__(
        self,
        param: Tensor,
        parts: Sequence[LayerShard],
        needed: Collection[str],
        tensors: dict[str, Any],
        bound: list[BoundPart],
    ) -> None:
        self.bound, self.param = bound, param
        self._parts, self._needed, self._tensors = parts, needed, tensors
        memory = local(param)
        self._shape, self._dtype = memory.shape, memory.dtype
        # Rows of a flat tensor or of a DTensor are tensors of their own, which may be left behind: their distance from
        # the beginning of the memory, in bytes.
        self._stride, address = memory.stride(), memory.data_ptr()
        self._views = [(part.param, part.param.data_ptr() - address) for part in bound if part.param is not param]
        states = [(key, x) for key, x in tensors.items() if isinstance(x, Tensor) and key != "step"]
        self._states = [(key, x, x.shape) for key, x in states]

    def holds(
        self, param: Tensor, parts: Sequence[LayerShard], needed: Collection[str], tensors: Mapping[str, Any]
    ) -> bool:
        """Whether all is still what was bound."""
        if param is not self.param or tensors is not self._tensors or parts != self._parts or needed != self._needed:
            return False
        memory = local(param)
        if memory.shape != self._shape or memory.dtype != self._dtype:
            return False
        if self._views:
            address = memory.data_ptr()
            if memory.stride() != self._stride or any(x.data_ptr() - address != at for x, at in self._views):
                return False
        for key, tensor, shape in self._states:  # noqa: SIM110  (a generator takes as long again)
            # Codec states work on these very tensors; of their memory nothing is remembered but what the shape says.
            if tensors.get(key) is not tensor or tensor.shape != shape:
                return False
        return True
