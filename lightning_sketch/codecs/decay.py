"""Decay of a whole state in constant time: stored = true / scale, and each step multiplies one scalar."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_sketch.codecs.state import CodecState, Number, StateSpec, Tensors, key_of
from lightning_sketch.kernels.schema import MIN_SCALE
from lightning_sketch.sharding.fake import is_fake

CPU = torch.device("cpu")


def decayed(scale: float, decay: float, tensors: Iterable[Tensor]) -> float:
    """The scale after one step of `decay`; renormalises `tensors` (modified in place) when it gets small.

    Args:
        scale: true value = stored value * scale.
        decay: in [0, 1]; 0 forgets everything.
        tensors: all tensors stored under this scale; asked for only then.
    """
    scale *= decay
    if scale >= MIN_SCALE:
        return scale
    for tensor in tensors:
        tensor.mul_(scale)
    return 1.0


def decayed_on_device(scale: Tensor, decay: Number, tensors: Iterable[Tensor]) -> Tensor:
    """`decayed` without reading anything: the scale, 0-d float64, and `tensors` are modified in place."""
    after = scale * decay
    small = after < MIN_SCALE
    one = torch.ones_like(after)
    factor = after.where(small, one)
    for tensor in tensors:
        tensor.mul_(factor)
    return scale.copy_(one.where(small, after))


def scale_tensor(value: Any = 1.0, name: str = "the scale", device: torch.device = CPU) -> Tensor:
    """A scale as ``optimizer.state[param]`` holds it: 0-d, float64, on the CPU, where reading it waits for no device.

    Args:
        value: such a tensor, which is returned itself; one that was moved or cast; or a plain number, which user code
            and checkpoints of older versions hold.
        name: for the error message, e.g. ``exp_avg_sq_scale of table.weight``.
        device: another one, where the numbers of steps stay there.

    Raises:
        ValueError: it is not one finite number above 0.
    """
    if is_fake(value):
        return value  # type: ignore[no-any-return]
    one = value.numel() == 1 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, int | float)
    number = float(value) if one else math.nan
    if not 0 < number < math.inf:
        found = number if one else f"of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name} is {found}, expected one finite number above 0. Something overwrote it, or cast it to a dtype "
            "that cannot hold it; load the states from a checkpoint"
        )
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.float64 and value.device == device:
        return value
    if device.type != "cpu":
        return torch.full((), number, dtype=torch.float64, device=device)  # copies nothing there
    return torch.tensor(number, dtype=torch.float64, device=device)


class ScaledState(CodecState):
    """A state some of whose tensors hold the true value divided by ``self["scale"]``.

    A scale that was moved, cast or replaced by a plain number is put right here, once, when the state is bound.
    """

    #: Names of the tensors that hold the true value divided by the scale.
    divided: ClassVar[tuple[str, ...]]

    def __init__(self, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(spec, tensors)
        key = key_of(spec.name, "scale")
        self._scale = scale_tensor(tensors[key], f"{key} of {spec.fqn}", spec.device if spec.on_device else CPU)
        if tensors[key] is not self._scale:
            tensors[key] = self._scale
        # As of the step that was begun last.
        self.scale: Number = self._scale if spec.on_device else 1.0 if is_fake(self._scale) else self._scale.item()
        self._decay = 1.0
        self._renormalized = False

    @property
    def renormalized(self) -> bool:
        return self._renormalized

    def deferred_scale(self) -> tuple[Tensor | None, float]:
        return self._scale, self._decay

    def rebound(self, seed: Any, tensors: Tensors) -> Self:
        other = super().rebound(seed, tensors)
        on_device = self.spec.on_device
        other.hold_scale(tensors[key_of(self.spec.name, "scale")] if on_device else self._scale.clone())
        return other

    def hold_scale(self, scale: Tensor) -> None:
        """Take another tensor for the scale."""
        self._scale = scale
        if self.spec.on_device:
            self.scale = scale

    def host_scale(self) -> float | None:
        return None if self.spec.on_device else self._scale.item()

    def take_scale(self, other: CodecState) -> None:
        assert isinstance(other, ScaledState)
        scale = other.scale
        assert isinstance(scale, float)
        self.scale = scale
        if scale != self._scale.item():
            self._scale.fill_(scale)

    def follow(self, leader: CodecState) -> None:
        self.decay_scale(leader.deferred_scale()[1])

    def decay_scale(self, decay: Number) -> Number:
        """The scale after one step of `decay`, see `decayed`; the scale and its tensors are modified in place."""
        if self.deferred:
            assert not isinstance(decay, Tensor)
            self._decay, self.scale = decay, 1.0
            return 1.0
        if self.spec.on_device:
            tensors = (getattr(self, name) for name in self.divided)
            self.scale = decayed_on_device(self._scale, decay, tensors)
            return self.scale
        assert not isinstance(decay, Tensor)
        self._decay = decay
        before: float = self._scale.item()
        self._renormalized = before * decay < MIN_SCALE
        scale = decayed(before, decay, (getattr(self, name) for name in self.divided))
        if scale != before:  # writing takes four times as long as reading
            self._scale.fill_(scale)
        self.scale = scale
        return scale
