"""The number of steps in ``optimizer.state[param]["step"]``, as torch.optim counts them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.sharding.fake import is_fake


def step_tensor(steps: float = 0.0, device: torch.device | str = "cpu") -> Tensor:
    """A 0-d tensor in float32, or in float64 where that is torch's default.

    Never in a default of 16 bits: bfloat16 counts to 256.
    """
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    if torch.device(device).type != "cpu":
        return torch.full((), float(steps), dtype=dtype, device=device)  # copies nothing there
    return torch.tensor(float(steps), dtype=dtype, device=device)


def read_step(value: Any, owner: str) -> float:
    """The number of steps that a user or a checkpoint gives, as torch takes it: a number, or a tensor of one.

    Args:
        value: what was found as ``step``.
        owner: the layer it was found for.

    Raises:
        ValueError: it is no number, negative, NaN or infinite.
    """
    if is_fake(value):  # no number can be read from it
        return 0.0
    number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    steps = float(value) if number else math.nan
    if not 0 <= steps < math.inf:
        raise ValueError(
            f"{owner}: its step is {value!r}; expected the number of steps made, 0 or more, as a number or a 0-d tensor"
        )
    return steps
