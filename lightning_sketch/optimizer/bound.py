"""What our rules step, bound: a part of a layer to its states, and a tensor to its parts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import CodecState
from lightning_sketch.kernels.schema import DeviceNumbers, StepCache
from lightning_sketch.layers.record import LayerPart, compute_dtype
from lightning_sketch.layers.shared import SharedLayer
from lightning_sketch.rules import LayerStep
from lightning_sketch.sharding.base import ACCELERATOR_BLOCKS
from lightning_sketch.sharding.gradient import RowGradient


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
        unit: its layer's name, and whether what steps leave out is counted by element, not by row.
        on_device: whether the numbers of steps stay on the device.
        cache: what its steps found out.
        alike: see `LayerStep`.
        most_blocks: into how many blocks its gradient may be cut on an accelerator.
    """

    param: Tensor
    states: Mapping[str, CodecState]
    momentum: CodecState | None
    momentum_beta: float
    lazy: bool
    dtype: torch.dtype
    unit: tuple[str, bool]
    on_device: bool = False
    cache: StepCache = field(default_factory=StepCache)
    alike: Hashable | None = None
    most_blocks: int = ACCELERATOR_BLOCKS

    @classmethod
    def bind(
        cls,
        part: LayerPart,
        param: Tensor,
        group: Mapping[str, Any],
        tensors: dict[str, Any],
        *,
        on_device: bool = False,
    ) -> BoundPart:
        """Bind `part` to the optimizer's `param` and its ``optimizer.state[param]``, which is allocated.

        Args:
            on_device: whether the numbers of steps stay on the device; scales are moved there.
        """
        states: dict[str, CodecState] = {}
        momentum, momentum_beta = None, 0.0
        for state, codec in part.layer.persistent_codecs().items():
            spec = part.spec(state, param, group)
            if on_device:
                spec = replace(spec, on_device=True)
            states[state] = codec.bind(spec, tensors)
            if codec.momentum:
                momentum, momentum_beta = codec.bind_momentum(spec, tensors), codec.momentum
        lazy, dtype = part.layer.lazy, compute_dtype(param)
        unit = part.layer.fqn, not lazy and all(state.elementwise for state in states.values())
        bound = cls(part.rows(param), states, momentum, momentum_beta, lazy, dtype, unit, on_device)
        bound.most_blocks = part.layer.most_blocks
        codecs = part.layer.persistent_codecs()
        if all(codec.steps_together for codec in codecs.values()):
            specs = [state.spec.alike() for state in states.values()]
            bound.alike = param.dtype, param.device, part.shard, tuple(codecs.items()), *specs
        return bound

    def step(
        self,
        gradient: RowGradient,
        numbers: Any,
        step: int | Tensor,
        *,
        maximize: bool,
        leave_out: bool = False,
        on_device: DeviceNumbers | None = None,
    ) -> LayerStep:
        """One step, to be run (it modifies the parameter and its states in place).

        Args:
            gradient: of this part.
            numbers: hyperparameters of this step, from `UpdateRule.numbers`.
            step: number of this step, from 1.
            maximize: whether to step along the gradient, not against it.
            leave_out: whether rows or elements that are not finite are left out.
            on_device: what stays on the device, the step's number among it.
        """
        if self.lazy:  # rows without a gradient are found now, and with them those to be left out
            gradient, leave_out = gradient.touched_only(leave_out=leave_out), False
        gradient.most_blocks = self.most_blocks
        return LayerStep(  # by position: by name it takes twice as long
            self.param,
            gradient,
            self.states,
            self.momentum,
            self.momentum_beta,
            numbers,
            step,
            self.dtype,
            maximize,
            self.cache,
            leave_out,
            on_device=on_device,
            alike=self.alike,
        )


@dataclass(slots=True)
class PendingUpdate:
    """A tensor with a gradient that our rules step.

    Args:
        group: its parameter group.
        param: the tensor.
        grad: its gradient, which torch's step does not see; ``None`` where it only takes part in what ranks agree on.
        parts: what lies in it.
        needed: states that the group's hyperparameters ask for.
        state: ``optimizer.state[param]``, empty before the first step.
        bound: the parts, bound; ``None`` if they have yet to be.
        gradients: of each part, unscaled; empty under ``FakeTensorMode``, where rows cannot be read.
        scale: what `grad` is still to be divided by; ``None`` for nothing.
        on_device: whether the numbers of its steps stay on its device.
        shared: its layers with states that other ranks share.
        ranks: the process groups over which these are divided; none if nothing is shared.
    """

    group: dict[str, Any]
    param: Tensor
    grad: Tensor | None
    parts: tuple[LayerPart, ...]
    needed: set[str]
    state: dict[str, Any]
    bound: list[BoundPart] | None
    gradients: list[RowGradient]
    scale: float | None = None
    on_device: bool = False
    shared: tuple[SharedLayer, ...] = ()
    ranks: tuple[Any, ...] = ()
