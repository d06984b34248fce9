"""What a gradient scaler leaves to torch's fused optimizers: unscaling, and skipping a step that overflowed.

It sets ``optimizer.grad_scale`` and ``optimizer.found_inf``, tensors of one number, which the kernels of ``fused=True``
read. Where numbers of steps stay on the device (`on_device`), ours read them there, too, and nothing waits. Elsewhere
torch's scaler finds that a converted optimizer does not support that, and does both itself; where somebody sets them by
hand, compressed layers follow the same verdict as the kept ones beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def overflowed(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether torch's fused kernels would leave the parameters of `group` alone. Must be the same on all ranks."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(group.get("fused")) and float(found_inf) == 1  # kernels compare with 1, too


def amp_on_device(
    optimizer: Optimizer, group: Mapping[str, Any], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """``found_inf`` and ``grad_scale`` on a device, unread, as they hold for `group`."""
    if not group.get("fused"):
        return None, None
    found: list[Tensor | None] = [getattr(optimizer, name, None) for name in ("found_inf", "grad_scale")]
    found_inf, scale = (None if x is None else x.to(device, non_blocking=True).view(()) for x in found)
    return found_inf, scale


def grad_scale(optimizer: Optimizer, group: Mapping[str, Any]) -> float | None:
    """What torch's fused kernels would divide the gradients of `group` by; ``None`` for nothing."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return None if scale is None or not group.get("fused") else float(scale)
