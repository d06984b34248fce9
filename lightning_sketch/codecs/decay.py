"""Decay of a whole state in constant time: stored = true / scale, and each step multiplies one scalar."""

from __future__ import annotations

from torch import Tensor

# Renormalise when the scale falls below this. Far from float32's smallest number, so that even tiny second moments keep
# their full precision, and rare: with beta2 = 0.999 once in 22,000 steps.
MIN_SCALE = 2.0**-32


def decayed(scale: float, decay: float, tensors: tuple[Tensor, ...]) -> float:
    """The scale after one step of `decay`; renormalises `tensors` (modified in place) when it gets small.

    Args:
        scale: true value = stored value * scale.
        decay: in [0, 1]; 0 forgets everything.
        tensors: all tensors stored under this scale.
    """
    scale *= decay
    if scale >= MIN_SCALE:
        return scale
    for tensor in tensors:
        tensor.mul_(scale)
    return 1.0
