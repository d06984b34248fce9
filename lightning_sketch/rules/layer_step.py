"""A step of one layer: its tensors, states and numbers, and what rules and kernels ask of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import CodecState
from lightning_sketch.codecs.state import add_scaled
from lightning_sketch.kernels.reference import over_rows
from lightning_sketch.kernels.schema import DTYPES, DeviceNumbers, FusedStep, KernelState, StepCache
from lightning_sketch.sharding import Block
from lightning_sketch.sharding.gradient import RowGradient, all_finite, finite_rows, small_rows


@dataclass(slots=True)  # not frozen: that triples what making one costs
class LayerStep:
    """Everything one step of one layer needs.

    Args:
        param: the local parameter as rows, ``[local_rows, *row_shape]`` (modified in place).
        gradient: the gradient as rows.
        states: codec states by torch's name (modified in place); a dropped state is absent.
        momentum: SM3's EMA of the preconditioned gradient (modified in place), if the codec has one.
        momentum_beta: the factor of that EMA.
        numbers: from `UpdateRule.numbers`.
        step: the layer's step number, from 1.
        dtype: dtype of arithmetic.
        maximize: whether to step along the gradient, not against it.
        cache: what earlier steps with this parameter and these states found out.
        leave_out: whether rows of the gradient that are not finite are left out; elements, where all states that the
            step changes are element-wise.
        finite: of the rows, bool ``[k]``, if `observe` found any to be left out; on accelerators always.
        by_element: the same of elements, which every pass finds anew.
        on_device: what the step takes from the device, where its numbers stay there; `numbers` and `step` may then be
            0-d float64 tensors.
        fused: whether a fused kernel makes the step.
        alike: equal for layers that differ in nothing but their values and seeds; ``None`` for a layer that is stepped
            alone.
    """

    param: Tensor
    gradient: RowGradient
    states: Mapping[str, CodecState]
    momentum: CodecState | None
    momentum_beta: float
    numbers: Any
    step: int | Tensor
    dtype: torch.dtype
    maximize: bool = False
    cache: StepCache = field(default_factory=StepCache)
    leave_out: bool = False
    finite: Tensor | None = None
    by_element: bool = False
    on_device: DeviceNumbers | None = None
    fused: bool = False
    alike: Hashable | None = None

    def begin(self, name: str, *, decay: float, weight: float | Tensor) -> CodecState | None:
        """Begin the step of a state, or ``None`` if it is dropped."""
        state = self.states.get(name)
        if state is not None:
            self.begin_state(state, decay, weight)
        return state

    def begin_state(self, state: CodecState, decay: float, weight: float | Tensor) -> None:
        """Begin the step of one of the states."""
        rows, device = self.gradient.rows, self.on_device
        if device is None:
            state.begin(decay=decay, weight=weight, step=self.step, rows=rows)
            return
        state.deferred = self.fused
        if self.fused:  # kernels know the step's number, and whether there is a step
            state.begin(decay=decay, weight=weight, step=0, rows=rows)
        else:
            kept = decay if self.skipped is None else torch.ones_like(device.step).where(self.skipped, decay)
            state.begin(decay=kept, weight=weight, step=device.step, rows=rows)

    @property
    def skipped(self) -> Tensor | None:
        """Whether the step is to change nothing, 0-d, as a gradient scaler found; ``None`` for no."""
        found = None if self.on_device is None else self.on_device.found_inf
        return None if found is None else found == 1  # torch's fused kernels compare with 1, too

    def fusable(self) -> bool:
        """Whether fused kernels take these tensors and codec states."""
        values, dtype = self.gradient.values, self.param.dtype
        if dtype not in DTYPES or values.dtype != dtype or not (values.is_contiguous() and self.param.is_contiguous()):
            return False
        if (cache := self.cache).fusable is None:
            states = [*self.states.values(), *([] if self.momentum is None else [self.momentum])]
            cache.fusable = all(state.fusable() for state in states)
        return cache.fusable

    def fuse(
        self,
        second: str | None,
        first: str | None,
        *,
        lr: float | Tensor,
        decay_factor: float | Tensor = 1.0,
        eps: float | Tensor = 0.0,
        weight_decay: float = 0.0,
        correction: float | Tensor = 1.0,
        bound: float = 0.0,
        nesterov: float = 0.0,
    ) -> FusedStep:
        """The fused step over two of the states, by name, whose step was begun; numbers as in `FusedStep`."""
        gradient, shard = self.gradient, self.gradient.shard
        # By position: by name it takes five times as long, and every step makes one for every layer.
        return FusedStep(
            self.param,
            gradient.values,
            None if gradient.rows is None else gradient.rows.contiguous(),
            shard.row_offset,
            shard.column_offset,
            _stored(self.states.get(second)) if second else None,
            _stored(self.states.get(first)) if first else None,
            _stored(self.momentum),
            lr,
            decay_factor,
            eps,
            weight_decay,
            correction,
            bound,
            nesterov,
            self.maximize,
            self.cache,
            self.leave_out,
            self.on_device,
        )

    def observe(self, *states: CodecState | None, weight_decay: float = 0.0) -> Tensor | None:
        """Find what the reference leaves out of this step, before its first pass over the gradient.

        Args:
            states: all that the step changes.
            weight_decay: the coupled one.

        Returns:
            how many rows or elements, 0-d int64 on the gradient's device, for which it does not wait; ``None`` for
            none, where that is known.
        """
        count = self._observe(states, weight_decay)
        if (skipped := self.skipped) is not None:  # then all of it is left out, and nothing is counted
            stepped = skipped.logical_not()
            count = None if count is None else count * stepped
            if not self.by_element:
                all_rows = stepped.expand(self.gradient.values.shape[0])
                self.finite = all_rows if self.finite is None else self.finite & all_rows
        return count

    def _observe(self, states: Sequence[CodecState | None], weight_decay: float) -> Tensor | None:
        values = self.gradient.values
        if not self.leave_out or values.numel() == 0:
            return None
        if not all(state is None or state.elementwise for state in states):
            shares_squares = any(state is not None and state.shares_squares for state in states)
            self.finite = self._small_rows(weight_decay) if shares_squares else finite_rows(values)
            return None if self.finite is None else self.finite.logical_not().sum()
        if values.device.type == "cpu" and all_finite(values):
            return None
        self.by_element = True
        spans = [values[block.span] for block in self.gradient.blocks]
        return values.numel() - torch.stack([_is_finite(span).sum() for span in spans]).sum()

    def _small_rows(self, weight_decay: float) -> Tensor | None:
        """Which rows have no such squares as would spoil what all rows share; ``None`` for all, as in `small_rows`."""
        if not weight_decay and (self.on_device is None or self.on_device.grad_scale is None):
            return small_rows(self.gradient.values)
        found = [(len(g), small_rows(g)) for _, g in self.gradients(weight_decay)]
        if all(small is None for _, small in found):
            return None
        every = self.gradient.values.new_ones(self.gradient.values.shape[0], dtype=torch.bool)
        return torch.cat([every[:rows] if small is None else small for rows, small in found])

    def gradients(self, weight_decay: float = 0.0) -> Iterator[tuple[Block, Tensor]]:
        """The gradient by blocks, ``[k, *row_shape]`` in `dtype`, after ``maximize`` and coupled weight decay.

        It is 0 where it is left out, as ``block.good`` says.
        """
        scale = None if self.on_device is None else self.on_device.grad_scale
        skipped = self.skipped if self.by_element else None
        stepped = None if skipped is None else skipped.logical_not()
        for block in self.gradient.blocks:
            values = self.gradient.values[block.span]
            g = values.to(self.dtype)
            if scale is not None:
                g = g / scale
            if self.maximize:
                g = -g
            if weight_decay:
                g = g.add(self.param[block.index], alpha=weight_decay)
            if self.finite is not None or self.by_element:
                good = _is_finite(values) if self.finite is None else over_rows(self.finite[block.span], values.ndim)
                good = good if stepped is None else good & stepped
                block, g = replace(block, good=good), g.where(good, _constant(block, 0.0, g))
            yield block, g

    def apply(self, block: Block, update: Tensor, lr: float | Tensor, decay_factor: float | Tensor = 1.0) -> None:
        """``param <- decay_factor * param - lr * update`` at the block's rows, rounded once."""
        before, good = self.param[block.index], block.good
        if isinstance(block.index, slice) and self.param.dtype == update.dtype:
            shrinks = isinstance(decay_factor, Tensor) or decay_factor != 1
            if good is not None:  # what is left out is multiplied by 1, and 0 is added
                update = update.where(good, _constant(block, 0.0, update))
                if shrinks:
                    factor = _constant(block, decay_factor, update)
                    decay_factor = factor.where(good, _constant(block, 1.0, update))
            add_scaled(before.mul_(decay_factor) if shrinks else before, update, -lr)
            return
        values = add_scaled(before.to(self.dtype).mul(decay_factor), update, -lr).to(self.param.dtype)
        self.param[block.index] = values if good is None else values.where(good, before)


def _is_finite(values: Tensor) -> Tensor:
    """`Tensor.isfinite` in two launches, not four."""
    return values.abs() < torch.inf


def _constant(block: Block, value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor beside `like`: ``where`` makes one of a number at every call, which is a launch."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)

    def make() -> Tensor:
        return torch.full((), value, dtype=like.dtype, device=like.device)

    return make() if block.whole is None else block.whole.memo(("constant", value, like.dtype), make)


def _stored(state: CodecState | None) -> KernelState | None:
    if state is None:
        return None
    stored = state.to_kernel()
    if state.deferred:
        stored.scale_at, stored.scale_decay = state.deferred_scale()
    return stored
