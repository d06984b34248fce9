"""Decay of a whole state in constant time: stored = true / scale, and each step multiplies one scalar."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs.base import CodecState, StateSpec, Tensors, key_of
from lightning_sketch.sharding.fake import is_fake

# Renormalise when the scale falls below this. Far from float32's smallest number, so that even tiny second moments keep
# their full precision, and rare: with beta2 = 0.999 once in 22,000 steps.
MIN_SCALE = 2.0**-32


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


def scale_tensor(value: Any = 1.0, name: str = "the scale") -> Tensor:
    """A scale as ``optimizer.state[param]`` holds it: 0-d, float64, on the CPU, where reading it waits for no device.

    Args:
        value: such a tensor, which is returned itself; one that was moved or cast; or a plain number, which user code
            and checkpoints of older versions hold.
        name: for the error message, e.g. ``exp_avg_sq_scale of table.weight``.

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
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.float64 and value.device.type == "cpu":
        return value
    return torch.tensor(number, dtype=torch.float64, device="cpu")


class ScaledState(CodecState):
    """A state some of whose tensors hold the true value divided by ``self["scale"]``.

    A scale that was moved, cast or replaced by a plain number is put right here, once, when the state is bound.
    """

    #: Names of the tensors that hold the true value divided by the scale.
    divided: ClassVar[tuple[str, ...]]

    def __init__(self, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(spec, tensors)
        key = key_of(spec.name, "scale")
        self._scale = scale_tensor(tensors[key], f"{key} of {spec.fqn}")
        if tensors[key] is not self._scale:
            tensors[key] = self._scale
        # As of the step that was begun last.
        self.scale: float = 1.0 if is_fake(self._scale) else self._scale.item()

    def decay_scale(self, decay: float) -> float:
        """The scale after one step of `decay`, see `decayed`; the scale and its tensors are modified in place."""
        before: float = self._scale.item()
        scale = decayed(before, decay, (getattr(self, name) for name in self.divided))
        if scale != before:  # writing takes four times as long as reading
            self._scale.fill_(scale)
        self.scale = scale
        return scale
