"""Kernels: fused steps where there is one for the device. The reference in plain PyTorch is the specification."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of Dynamo

from lightning_sketch.kernels import native
from lightning_sketch.kernels.schema import DTYPES, FusedStep, Observed

logger = logging.getLogger(__name__)

#: Performs steps, and raises the versions of the parameters and states that it writes, as torch's operators do.
#: Returns how many rows, or elements, each step left out: int64 ``[len(layers)]`` on the layers' device, for which it
#: does not wait.
FusedKernel = Callable[[Sequence[FusedStep]], Tensor]

#: Finds what gradients add to sums of rows and columns, for each of `schema.observation`.
ObserveKernel = Callable[[Sequence[FusedStep]], list[Observed]]


@_disable_dynamo
def fused_kernel(device: torch.device) -> FusedKernel | None:
    """What performs fused steps of parameters on a device; ``None`` where there is only the reference."""
    found = _kernels_on(device)
    return None if found is None else found.step


@_disable_dynamo
def observe_kernel(device: torch.device) -> ObserveKernel | None:
    """What looks at gradients on a device; ``None`` where there is only the reference."""
    found = _kernels_on(device)
    return None if found is None else found.observe_gradients


def _kernels_on(device: torch.device) -> Any:
    """The module of the kernels for a device, imported when it is first asked for."""
    if device.type == "cpu" and native.library() is not None:
        from lightning_sketch.kernels import cpu  # defines torch operators

        return cpu
    if device.type == "cuda" and not native.wants_reference() and _has_triton():
        from lightning_sketch.kernels import triton

        return triton
    return None


#: Why kernels are not used for some layers, by kind of device: they did not prove right there.
unproved: dict[str, str] = {}


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def describe(device: torch.device) -> str:
    """What does the steps of compressed layers on a device, in words for a report."""
    if device.type in ("cpu", "meta"):
        return native.describe()
    if fused_kernel(device) is not None:
        problem = unproved.get(device.type)
        return f"Triton on {device.type}" + (f"; plain PyTorch where it proved wrong ({problem})" if problem else "")
    if device.type != "cuda":
        return f"plain PyTorch on {device.type}, which has no kernels"
    why = f"switched off by {native.VARIABLE}" if native.wants_reference() else "Triton is not installed"
    return f"plain PyTorch on cuda: {why}"


def announce(device: torch.device) -> None:
    """Say once, at the first step on an accelerator, what does the steps there."""
    if device.type != "cpu":
        _announce(device.type, fused_kernel(device) is None)


@functools.cache
def _announce(kind: str, reference: bool) -> None:
    # A warning where it is slow, because Python shows warnings of unconfigured loggers.
    level = logging.WARNING if reference else logging.INFO
    logger.log(level, "steps of compressed layers: %s", describe(torch.device(kind)))


@_disable_dynamo
def coalesced_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of a sparse COO gradient with one sparse dimension, and the sums of those that occur repeatedly.

    Compiled, sums are taken in the order of occurrence. torch's depend on its sort, which is not stable.

    Returns:
        row ids ``[k]``, ascending; values ``[k, *row_shape]``.
    """
    if not grad.is_coalesced() and native.library() is not None:
        ids, values = grad._indices()[0], grad._values()
        if _plain(values) and grad.shape[0] <= 1 << 32 and len(ids) < 1 << 31:
            from lightning_sketch.kernels.coalesce import coalesce  # defines a torch operator

            return coalesce(ids, values)
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype in DTYPES and tensor.is_contiguous()
