"""Tensors without values, with which ``FakeTensorMode`` estimates memory: nothing can be read from them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_sketch.sharding import is_dtensor, local

#: Whether a mode around all this answers when a number is read from a fake tensor: then steps are done as on real ones.
#: `benchmarks.launches` counts kernels that way.
readable = False


def is_fake(tensor: Any) -> bool:
    """Whether `tensor`, or the local part of a DTensor, is a FakeTensor, of which no number can be read."""
    return not readable and is_fake_tensor(tensor)


def is_fake_tensor(tensor: Any) -> bool:
    """The same, also where a mode answers."""
    # By name, and most tensors by type alone: steps ask it.
    if type(tensor) in (Tensor, nn.Parameter) or not isinstance(tensor, Tensor):
        return False
    held = local(tensor) if is_dtensor(tensor) else tensor
    return any(cls.__name__ == "FakeTensor" for cls in type(held).__mro__)
