"""Learning rates over a training, as shares of the peak; ``warm_up`` is a share of the steps, ``last`` of the peak."""

from __future__ import annotations

import math


def linear(step: int, steps: int, *, warm_up: float = 0.0, last: float) -> float:
    """Up to the peak in a straight line, and down in another."""
    rising = (step + 1) / (warm_up * steps) if warm_up else 1.0
    return min(rising, 1 - (1 - last) * _after(step, steps, warm_up))


def cosine(step: int, steps: int, *, warm_up: float, last: float) -> float:
    """Up in a straight line, down along half a cosine."""
    if step < warm_up * steps:
        return (step + 1) / (warm_up * steps)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * _after(step, steps, warm_up)))


def quadratic_then_constant(step: int, steps: int, *, warm_up: float) -> float:
    """SM3's: its sums grow, which already makes steps smaller."""
    return min((step + 1) / (warm_up * steps), 1.0) ** 2


def linear_then_inverse_root(step: int, steps: int, *, warm_up: float) -> float:
    """Adafactor's, of a relative step: its falling part begins where the warm-up ends."""
    return min((step + 1) / (warm_up * steps), math.sqrt(warm_up * steps / (step + 1)))


def _after(step: int, steps: int, warm_up: float) -> float:
    """How much of what follows the warm-up is over."""
    return max(0.0, step - warm_up * steps) / (steps - warm_up * steps)
