"""Some rows of a layer with the states that torch's optimizer would keep of them, stepped beside the compressed ones.

The rules themselves step these rows, over states that are dense, in plain PyTorch. A moment that the policy drops is
dropped here, too: beta1 is what the policy says, and figures are about what it meant to keep. So is a floor added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import CodecState, Keep, StateSpec
from lightning_sketch.kernels.reference import over_rows
from lightning_sketch.layers.record import LayerPart, compute_dtype
from lightning_sketch.monitor.sample import all_of_rows, choose_rows, take_rows
from lightning_sketch.optimizer.amp import amp_on_device
from lightning_sketch.optimizer.bound import PendingUpdate
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.rules import LayerStep, UpdateRule
from lightning_sketch.sharding import Block, Shard
from lightning_sketch.sharding.gradient import RowGradient, all_finite, finite_rows, small_rows


@dataclass(slots=True)
class Taken:
    """What a layer's step does to the sampled rows, copied before it is made.

    Args:
        own: the step.
        gradient: ``[n, *row_shape]`` in the dtype of arithmetic, unscaled, with coupled weight decay, and turned round
            under ``maximize``; 0 where absent, and from `Shadow.advance` on where it is left out.
        present: which rows have a gradient, bool ``[n]``; ``None`` for all.
        leave_out: whether rows or elements that are not finite are left out.
        stepped: whether there is a step at all, 0-d, as a gradient scaler found on the device; ``None`` for yes.
        steps: the step count before; ``None`` where to read it would be to wait for a device.
        shown: which elements are there and not left out, bool, broadcastable to `gradient`; ``None`` for all. From
            `Shadow.advance` on.
    """

    own: PendingUpdate
    gradient: Tensor
    present: Tensor | None
    leave_out: bool
    stepped: Tensor | None
    steps: int | None
    shown: Tensor | None = None


@dataclass(slots=True, frozen=True)
class Stored:
    """What a compressed state says of the sampled rows.

    Args:
        values: ``[n, *row_shape]``.
        state: whose values they are; ``None`` where the layer has not been stepped.
    """

    values: Tensor
    state: CodecState | None

    def given(self, values: Tensor, *, bounded: bool) -> _Given:
        """These or other values of the state, as rules get them: see `CodecState.as_read` and `CodecState.bounded`."""
        if self.state is None:
            return _Given(values, False)
        return _Given(self.state.as_read(values).expand(values.shape), bounded and self.state.bounded)


class Shadow:
    """The sampled rows of one part of a layer.

    Args:
        part: the part.
        own: the first step that is watched.
        gradient: its gradient of that step.
        count: how many rows, at most.

    Attributes:
        part: as it is stepped now.
        rows: local ids, int64 ``[n]``.
        states: exact states by name, each ``[n, *row_shape]`` in the dtype of arithmetic; a dropped one is absent.
        steps: how many steps the layer has made.
        replaced: whether states were replaced since, and are to be taken for exact.
    """

    def __init__(self, part: LayerPart, own: PendingUpdate, gradient: RowGradient, count: int) -> None:
        self.part, self.replaced = part, False
        self.rows = choose_rows(gradient, part.layer.seed, count)
        self.dtype = compute_dtype(own.param)
        self.start(own)

    def start(self, own: PendingUpdate) -> None:
        """Take the states as they are for exact: they are fresh, or were loaded or converted."""
        self.block = Block(self.part.shard, self.rows, slice(0, len(self.rows)))
        stored = self.stored(own.param, own.group, own.state, on_device=own.on_device)
        self.states = {name: state.values.clone() for name, state in stored.items()}
        self._exact = {name: _Exact(name, state) for name, state in self.states.items()}
        self.replaced = False
        self.steps = int(own.state["step"]) if own.state else 0

    def stored(
        self, param: Tensor, group: Mapping[str, Any], state: dict[str, Any], *, on_device: bool
    ) -> dict[str, Stored]:
        """What the compressed states say of these rows.

        Args:
            state: ``optimizer.state[param]``; if it is empty the layer has not been stepped.
            on_device: whether the numbers of steps stay on the device.
        """
        part, shape = self.part, (len(self.rows), *self.part.shard.row_shape)
        found: dict[str, Stored] = {}
        for name, codec in part.layer.persistent_codecs().items():
            spec = part.spec(name, param, group)
            if not state:
                fresh = torch.full(shape, spec.fill, dtype=self.dtype, device=self.rows.device)
                found[name] = Stored(fresh, None)
                continue
            bound = codec.bind(replace(spec, on_device=on_device), state)
            found[name] = Stored(bound.estimate(self.block).expand(shape), bound)
        return found

    def take(self, optimizer: CompressedGroups, own: PendingUpdate, gradient: RowGradient) -> Taken:
        """Copy what the step that is about to be made does to these rows. Waits for no device.

        States that are not of the step that was made here last are taken for exact anew: they were reset, say.
        """
        steps = int(own.state["step"]) if own.state and not own.on_device else None
        if self.replaced or not own.state or steps not in (None, self.steps):
            self.start(own)
        part, group, leave_out = self.part, own.group, optimizer.compression.nonfinite != "propagate"
        values, present = take_rows(gradient, self.rows, lazy=part.layer.lazy)
        stepped = None
        if own.on_device:
            found_inf, scale = amp_on_device(optimizer, group, values.device)
            values = values if scale is None else values / scale
            stepped = None if found_inf is None else found_inf != 1  # torch's kernels compare with 1, too
        g = values.to(self.dtype)
        g = -g if group.get("maximize") else g
        if decay := optimizer.rule.coupled_weight_decay(group):
            g = g.add(part.rows(own.param.detach()).index_select(0, self.rows), alpha=decay)
            g = g if present is None else g.masked_fill_(over_rows(~present, g.ndim), 0.0)
        return Taken(own, g, present, leave_out, stepped, steps)

    def advance(self, rule: UpdateRule, taken: Taken, *, leave_out: bool) -> bool:
        """Make the step that was taken; whether there was one: no rank may have had a gradient. Waits for no device.

        Args:
            leave_out: whether the step may have left out anything.
        """
        own = taken.own
        if not own.on_device and int(own.state.get("step", 0)) == (taken.steps or 0):
            return False
        self.steps += 1
        if len(self.rows):
            taken.leave_out = taken.leave_out and leave_out
            states = own.bound[0].states.values() if own.bound else ()
            good_rows = small_rows if any(state.shares_squares for state in states) else finite_rows
            _leave_out(taken, good_rows, by_element=bool(own.bound and own.bound[0].unit[1]))
            anything = torch.empty_like(taken.gradient)
            rule.advance(_layer_step(rule, own.group, self.steps, anything, taken.gradient, self._bound(taken)))
        return True

    def _bound(self, taken: Taken) -> Mapping[str, CodecState]:
        """The exact states. What is left out of a step is to them what rows are that a sparse gradient lacks."""
        for name, exact in self._exact.items():
            good = None if self.part.layer.codecs[name].decays_absent_rows else taken.shown
            if taken.stepped is not None:
                good = taken.stepped if good is None else good & taken.stepped
            exact.good = None if good is None else good.expand_as(self.states[name])
        return self._exact

    def updates(self, rule: UpdateRule, taken: Taken, stored: Mapping[str, Stored]) -> tuple[Tensor, Tensor]:
        """The update of this step by the compressed states, and by the exact ones; of rows with a gradient.

        Both are ``[m, *row_shape]``, without learning rate and weight decay, and with the floor that the codec adds.
        Waits for the device.
        """
        own, shown, steps = taken.own, taken.shown, int(taken.own.state["step"])
        rows = None if shown is None else all_of_rows(shown)

        def update(states: Mapping[str, CodecState]) -> Tensor:
            zeros = torch.zeros_like(taken.gradient)
            layer = _layer_step(rule, own.group, steps, zeros, taken.gradient, states)
            rule.reference(layer)
            return layer.param if rows is None else layer.param[rows]

        return (
            update({name: state.given(state.values, bounded=True) for name, state in stored.items()}),
            update({name: stored[name].given(values, bounded=False) for name, values in self.states.items()}),
        )


def _leave_out(taken: Taken, good_rows: Callable[[Tensor], Tensor | None], *, by_element: bool) -> None:
    """Find what is absent or not finite, by row, or by element where all states are element-wise; it becomes 0."""
    values, finite = taken.gradient, None
    if taken.leave_out and by_element:
        finite = None if values.device.type == "cpu" and all_finite(values) else values.isfinite()
    elif taken.leave_out and (rows := good_rows(values)) is not None:
        finite = over_rows(rows, values.ndim)
    present = None if taken.present is None else over_rows(taken.present, values.ndim)
    taken.shown = present if finite is None else finite if present is None else present & finite
    if finite is not None:
        taken.gradient = values.where(finite, 0.0)


def _layer_step(
    rule: UpdateRule,
    group: Mapping[str, Any],
    steps: int,
    param: Tensor,
    gradient: Tensor,
    states: Mapping[str, CodecState],
) -> LayerStep:
    """A step of the rows by themselves, at a learning rate of 1 (param and states are modified in place)."""
    numbers = rule.numbers({**group, "lr": 1.0, "weight_decay": 0.0}, steps)
    rows = RowGradient(Shard.whole(tuple(gradient.shape)), None, gradient)
    return LayerStep(param, rows, states, None, 0.0, numbers, steps, gradient.dtype)


def _spec(name: str, values: Tensor) -> StateSpec:
    shard = Shard.whole(tuple(values.shape))
    return StateSpec(name, "the sample", True, shard, 0, values.dtype, values.dtype, values.device)


class _Exact(CodecState):
    """A dense state.

    Attributes:
        good: False for elements that stay in this step, shaped like the state; ``None`` for none.
    """

    good: Tensor | None = None

    def __init__(self, name: str, values: Tensor) -> None:
        super().__init__(_spec(name, values), {name: values})
        self.dense = Keep().bind(self.spec, self.tensors)

    def begin(self, **numbers: Any) -> None:
        self.dense.begin(**numbers)

    def add(self, block: Block, x: Tensor) -> None:
        self.dense.add(block if self.good is None else replace(block, good=self.good[block.index]), x)

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.dense.read(block, x)

    def estimate(self, block: Block) -> Tensor:
        return self.dense.estimate(block)


class _Given(CodecState):
    """A state after its step, of which a rule makes the update."""

    adds_values = False

    def __init__(self, values: Tensor, bounded: bool) -> None:
        super().__init__(_spec("", values), {})
        self.values, self.bounded = values, bounded

    def begin(self, **numbers: Any) -> None:
        """The step was made."""

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.values[block.index]

    def estimate(self, block: Block) -> Tensor:
        return self.values[block.index]
