"""What an update rule is, and the pieces that all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sketch.codecs import Codec, CodecState
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.rules.layer_step import LayerStep
from lightning_sketch.sharding import Block

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

    def kept_states(self, group: Mapping[str, Any], param: Tensor) -> Sequence[StateDef]:
        """The states that torch's own step keeps of a parameter that is not compressed."""
        return self.states_of(group, param)

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

    def advance(self, layer: LayerStep) -> None:
        """One step of the states alone, in plain PyTorch (layer.states modified in place).

        The parameter is anything afterwards. Rules override it where it takes less than `reference`.
        """
        self.reference(layer)

    def fusable(self, states: Collection[str]) -> bool:
        """Whether `fuse` can say a step with these states, by name."""
        return True

    @abstractmethod
    def fuse(self, layer: LayerStep) -> FusedStep:
        """Begin the step of the states, and say what is left to do (layer.states modified in place)."""


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


def moment_bound(first: CodecState | None, beta1: float, beta2: float) -> float:
    r"""The largest :math:`|m| / \sqrt v` of exact moments, where a first moment is to be held to that; else 0.

    Two EMAs of the same gradients obey :math:`|m| \le \sqrt v (1-\beta_1) / \sqrt{(1-\beta_2)(1-\beta_1^2/\beta_2)}`
    (Cauchy-Schwarz), 7.3 times the root at Adam's defaults. A rare row that collides with a frequent one in a sketch
    holds the other's `m`, which would make a huge update.

    Args:
        first: holds m; ``None`` where m is the gradient.
        beta1, beta2: as in Adam.
    """
    if first is None or not first.bounded or beta2 >= 1 or (beta1 > 0 and beta1**2 >= beta2):
        return 0.0  # none is asked for, or there is none
    ratio = beta1**2 / beta2 if beta1 > 0 else 0.0
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio))


def bounded(m: Tensor, v: Tensor, factor: float) -> Tensor:
    """Clamp to ``factor`` times the root of a second moment.

    Args:
        m: ``[k, ...]``.
        v: broadcastable to `m`.
        factor: 0 for no clamp.
    """
    if factor == 0:
        return m
    bound = v.sqrt().mul_(factor)
    return m.clamp(-bound, bound)


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
