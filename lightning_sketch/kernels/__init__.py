"""Kernels: fused steps for hot (rule, codec) pairs. The reference in plain PyTorch is the specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Performs one step of one layer. Takes a `lightning_sketch.rules.base.LayerStep`.
Kernel = Callable[[Any], None]
#: Whether a kernel can do a step: (codec by state name, device) -> bool.
Supports = Callable[[Mapping[str, Any], torch.device], bool]

_REGISTRY: dict[str, list[tuple[Kernel, Supports]]] = {}


def register(rule: str, kernel: Kernel, supports: Supports = lambda codecs, device: True) -> None:
    """Offer `kernel` for an update rule. Later registrations are asked first."""
    _REGISTRY.setdefault(rule, []).insert(0, (kernel, supports))


def select(rule: str, codecs: Mapping[str, Any], device: torch.device) -> Kernel:
    """The first kernel of `rule` that supports these codecs on this device."""
    return next(kernel for kernel, supports in _REGISTRY[rule] if supports(codecs, device))
