"""What an update rule is, and the pieces that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sketch import kernels
from lightning_sketch.codecs import Codec, CodecState
from lightning_sketch.codecs.base import add_scaled
from lightning_sketch.kernels.reference import over_rows
from lightning_sketch.kernels.schema import DTYPES, DeviceNumbers, FusedStep, KernelState, StepCache
from lightning_sketch.rules import alike
from lightning_sketch.sharding import Block
from lightning_sketch.sharding.gradient import RowGradient, all_finite, finite_rows

#: How an optimizer keeps a layer's ``step``: as a tensor, as a Python number, or not at all.
Count = Literal["tensor", "number", "none"]


@dataclass(frozen=True)
class StateDef:
    """A state that torch's optimizer keeps.

    Args:
        name: its name there.
        signed: whether it may be negative.
        weights: whether it holds parameters, not a moment of gradients (averaged weights).
    """

    name: str
    signed: bool
    weights: bool = False


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
        state.fused = self.fused
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

    def observe(self, *states: CodecState | None) -> Tensor | None:
        """Find what the reference leaves out of this step, before its first pass over the gradient.

        Args:
            states: all that the step changes.

        Returns:
            how many rows or elements, 0-d int64 on the gradient's device, for which it does not wait; ``None`` for
            none, where that is known.
        """
        count = self._observe(states)
        if (skipped := self.skipped) is not None:  # then all of it is left out, and nothing is counted
            stepped = skipped.logical_not()
            count = None if count is None else count * stepped
            if not self.by_element:
                all_rows = stepped.expand(self.gradient.values.shape[0])
                self.finite = all_rows if self.finite is None else self.finite & all_rows
        return count

    def _observe(self, states: Sequence[CodecState | None]) -> Tensor | None:
        values = self.gradient.values
        if not self.leave_out or values.numel() == 0:
            return None
        if not all(state is None or state.elementwise for state in states):
            self.finite = finite_rows(values)
            return None if self.finite is None else self.finite.logical_not().sum()
        if values.device.type == "cpu" and all_finite(values):
            return None
        self.by_element = True
        spans = [values[block.span] for block in self.gradient.blocks]
        return values.numel() - torch.stack([_is_finite(span).sum() for span in spans]).sum()

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


class UpdateRule(ABC):
    """The mathematics of one optimizer family, written over codec states."""

    #: The kernels' name of the rule.
    name: ClassVar[str]
    #: Group flags that the rule does not implement; truthy means an error for compressed layers.
    refused_flags: ClassVar[tuple[str, ...]] = ("differentiable",)

    #: Whether torch's own optimizer takes sparse gradients, where it has neither weight decay nor a fused kernel.
    torch_takes_sparse: ClassVar[bool] = True

    @abstractmethod
    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        """The states torch keeps under these hyperparameters."""

    def states_of(self, group: Mapping[str, Any], param: Tensor) -> Sequence[StateDef]:
        """The states of one parameter of the group: the same for all, unless they depend on its shape."""
        return self.states(group)

    def stock_count(self, group: Mapping[str, Any], param: Tensor) -> Count | None:
        """How the optimizer's own step keeps ``step`` of compressed layers, where it does; see `LayerRecord`."""
        return None

    def check_codecs(self, fqn: str, codecs: Mapping[str, Codec]) -> None:  # noqa: B027
        """Raise ValueError if a layer cannot be trained with these codecs of its states, by name."""

    def check(self, group: Mapping[str, Any], fqn: str) -> None:
        """Raise ValueError if a compressed layer cannot be trained with these hyperparameters."""
        for flag in self.refused_flags:
            if group.get(flag, False):
                raise ValueError(
                    f"{flag}=True is not supported for compressed layers, and {fqn} is one; "
                    f"set {flag}=False or let the policy keep {fqn}"
                )

    def keeps_sparse(self, group: Mapping[str, Any]) -> bool:
        """Whether torch's own optimizer steps a kept layer that has a sparse gradient."""
        return self.torch_takes_sparse and not (group.get("weight_decay") or group.get("fused"))

    def coupled_weight_decay(self, group: Mapping[str, Any]) -> float:
        """The factor of the parameter that is added to the gradient."""
        return float(group.get("weight_decay", 0.0))

    @abstractmethod
    def numbers(self, group: Mapping[str, Any], step: int | Tensor) -> Any:
        """The hyperparameters as the rule needs them: the same for all layers of a group that make that step.

        Args:
            group: torch's parameter group.
            step: the layers' step number, from 1. Where it stays on the device, float64 ``[layers]`` there: of each
                layer, and nothing is read from it.

        Returns:
            numbers in a tuple or a dataclass; with a tensor of steps some are float64, 0-d or ``[layers]``.
        """

    @abstractmethod
    def reference(self, layer: LayerStep) -> Tensor | None:
        """One step of one layer in plain PyTorch (layer.param and layer.states modified in place).

        Returns:
            what `LayerStep.observe` says of what was left out.
        """

    def fusable(self, states: Collection[str]) -> bool:
        """Whether `fuse` can say a step with these states, by name."""
        return True

    @abstractmethod
    def fuse(self, layer: LayerStep) -> FusedStep:
        """Begin the step of the states, and say what is left to do (layer.states modified in place)."""


def run(rule: UpdateRule, layers: Iterable[LayerStep]) -> Tensor | None:
    """Perform the steps of layers: together in fused kernels where that is possible, the others by the reference.

    Returns:
        how many rows of each layer were left out (elements, where all states are element-wise), int64
        ``[len(layers)]`` on a device of theirs, for which it does not wait; ``None`` for none, where that is known.
    """
    # Apart where numbers stay on the device: such steps read other tables.
    fused: dict[tuple[torch.device, bool], tuple[kernels.FusedKernel, list[int], list[FusedStep]]] = {}
    by_device: dict[torch.device, kernels.FusedKernel | None] = {}
    left_out: dict[int, Tensor] = {}  # by layer: what no kernel counts
    together: dict[Hashable, list[tuple[int, LayerStep]]] = {}  # what the reference steps at once
    total = 0
    for number, layer in enumerate(layers):
        total, device = number + 1, layer.param.device
        if device not in by_device:
            by_device[device] = kernels.fused_kernel(device)
            kernels.announce(device)
        kernel, count = by_device[device], layer.gradient.left_out
        if kernel is not None and layer.fusable() and rule.fusable(layer.states):
            layer.fused = True
            _, numbers, steps = fused.setdefault((device, layer.on_device is not None), (kernel, [], []))
            numbers.append(number)
            steps.append(rule.fuse(layer))
        elif (kind := alike.kind(layer)) is not None:
            together.setdefault(kind, []).append((number, layer))
        else:
            observed = rule.reference(layer)
            count = observed if count is None else count
            layer.gradient.forget_blocks()
        if count is not None:
            left_out[number] = count
    for members in together.values():
        size = alike.evenly(len(members), alike.most_together(members[0][1].param.numel()))
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            some = [layer for _, layer in batch]
            if len(some) == 1:
                counts = None if (count := rule.reference(some[0])) is None else count.view(1)
                some[0].gradient.forget_blocks()
            else:
                counts = alike.step_together(rule.reference, some)
            if counts is not None:
                left_out |= dict(zip((number for number, _ in batch), counts.unbind(), strict=True))
    by_kernel = [(numbers, kernel(steps)) for kernel, numbers, steps in fused.values()]
    if len(by_kernel) == 1 and not left_out and len(by_kernel[0][0]) == total:
        return by_kernel[0][1]
    for numbers, counts in by_kernel:
        left_out = dict(zip(numbers, counts.unbind(), strict=True)) | left_out
    if not left_out:
        return None
    device = next((x.device for x in left_out.values() if x.device.type != "cpu"), torch.device("cpu"))
    none = torch.zeros((), dtype=torch.int64, device=device)
    return torch.stack([left_out[i].to(device, non_blocking=True) if i in left_out else none for i in range(total)])


def learning_rate(group: Mapping[str, Any], step: int | Tensor) -> float | Tensor:
    """The group's learning rate: a number, or where steps stay on the device and it is a tensor there, 0-d float64."""
    lr = group["lr"]
    if isinstance(step, Tensor) and isinstance(lr, Tensor) and lr.device == step.device:
        return lr.detach().to(torch.float64).view(())
    return float(lr)


def safe_divide(numerator: Tensor, denominator: Tensor, second_moment: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the second moment is 0.

    A second moment of 0 says that this element never had a gradient: what an approximate first moment holds there is
    noise, and dividing it by eps alone would blow the parameter up.

    Args:
        second_moment: broadcastable to `numerator`.

    Returns:
        a new tensor shaped like `numerator`.
    """
    return (numerator / denominator).masked_fill_(second_moment == 0, 0.0)


def bounded_first_moment(m: Tensor, v: Tensor, beta1: float, beta2: float) -> Tensor:
    r"""Clamp a sketched first moment to what the second moment allows.

    Two EMAs of the same gradients obey :math:`|m| \le \sqrt v (1-\beta_1) / \sqrt{(1-\beta_2)(1-\beta_1^2/\beta_2)}`
    (Cauchy-Schwarz), 7.3 times the root at Adam's defaults. A rare row that collides with a frequent one holds the
    other's `m`, and its own small `v` would turn that into a huge update.

    Args:
        m: ``[k, ...]``.
        v: broadcastable to `m`.
    """
    factor = first_moment_bound(beta1, beta2)
    if factor is None:
        return m
    bound = v.sqrt().mul_(factor)
    return m.clamp(-bound, bound)


def first_moment_bound(beta1: float, beta2: float) -> float | None:
    """The largest :math:`|m| / \\sqrt v`; ``None`` if there is none."""
    return None if beta1**2 >= beta2 else (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5


def add_moments(layer: LayerStep, second: CodecState, first: CodecState | None, weight_decay: float) -> None:
    """Add all of the gradient to a first moment, if there is one, and its squares to a second; settle both."""
    adding = [state for state in (first, second) if state is not None and state.adds_values]
    if adding:
        for block, g in layer.gradients(weight_decay):
            for state in adding:
                state.add(block, g.square() if state is second else g)
    if first is not None:
        first.settle()
    second.settle()


def read_second(second: CodecState, block: Block, g: Tensor) -> Tensor:
    """A second moment after this step at the block's rows. Squares are made for codecs that look at them only."""
    return second.read(block, g.square() if second.reads_values else g)


def precondition(layer: LayerStep, block: Block, update: Tensor) -> Tensor:
    """Apply SM3's momentum, an EMA of the preconditioned gradient, to a block of updates."""
    if layer.momentum is None:
        return update
    layer.momentum.add(block, update)
    return layer.momentum.read(block, update)


def begin_momentum(layer: LayerStep) -> None:
    """Begin the step of SM3's momentum."""
    if layer.momentum is not None:
        layer.begin_state(layer.momentum, layer.momentum_beta, 1 - layer.momentum_beta)
