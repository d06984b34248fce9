"""The number of steps in ``optimizer.state[param]["step"]``, as torch.optim counts them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sketch.fake import is_fake


def counter(steps: float = 0.0, device: torch.device | str = "cpu") -> Tensor:
    """A 0-d tensor in float32, or in float64 where that is torch's default.

    Never in a default of 16 bits: bfloat16 counts to 256.
    """
    if is_fake(steps):  # no number can be read from it
        steps = 0.0
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(float(steps), dtype=dtype, device=device)
