"""Kernels on an accelerator are proved there, against the reference on the CPU, before they step a layer.

Once for each kind of layer and device, on small cases, when the first such layer is bound. It takes the time of
compiling what is needed anyway, and waits for the device then and never again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sketch import kernels
from lightning_sketch.kernels.schema import DeviceNumbers
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.optimizer.bound import BoundPart
from lightning_sketch.optimizer.on_device import numbers_of
from lightning_sketch.rules import UpdateRule
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.gradient import RowGradient

logger = logging.getLogger(__name__)

#: Rows from which on kernels cut tables otherwise, a little more than that, and few; columns wider than any tile.
MANY_ROWS, MORE_ROWS, SOME_ROWS, MANY_COLUMNS = 16_384, 16_387, 40, 4_104
#: Largest difference, of the largest element: float32 sums in another order, after which a state in bfloat16 rounds to
#: its other neighbour.
CLOSE, CLOSE_BFLOAT16 = 2.0**-18, 2.0**-6
#: Of states in codes, and with them of all else, this part may differ, and one number: a gradient with coupled weight
#: decay, or a parameter, may be a rounding apart, and where that lies beside a threshold of the noise, so is a code.
OTHER_CODES = 1e-4
STEPS = 2
PARAMETER = "the parameter"

_proved: dict[tuple[Any, ...], bool] = {}


def proved(
    rule: UpdateRule,
    layer: LayerRecord,
    param: Tensor,
    group: Mapping[str, Any],
    *,
    sparse: bool,
    kernel: kernels.FusedKernel,
    on_device: bool = False,
) -> bool:
    """Whether `kernel` steps layers like this one, on the device of `param`, as the reference does on the CPU.

    If not, a warning says so once, and `report` for as long as the process lives; the reference is to step them.

    Args:
        param: the layer's local parameter, ``[local_rows, ...]``.
        group: its parameter group.
        sparse: whether its gradients are.
        on_device: whether the numbers of its steps stay on the device.
    """
    numel = math.prod(param.shape[1:])
    case = numel % 8 == 0, numel == 1, numel > MANY_COLUMNS - 8, len(param) >= MANY_ROWS
    codecs = tuple(sorted(layer.codecs.items()))
    key = (param.device, type(rule), codecs, param.dtype, sparse, bool(group.get("maximize")), *case, kernel, on_device)
    if key not in _proved:
        problem = _problem(rule, layer, param, group, sparse, kernel, on_device)
        _proved[key] = problem is None
        if problem is not None:
            kernels.unproved[param.device.type] = f"{layer.fqn}: {problem}"
            logger.warning(
                "kernels on %s do not step %s as they should (%s): plain PyTorch does, more slowly. Please report this",
                param.device,
                layer.fqn,
                problem,
            )
    return _proved[key]


def _problem(
    rule: UpdateRule,
    layer: LayerRecord,
    param: Tensor,
    group: Mapping[str, Any],
    sparse: bool,
    kernel: kernels.FusedKernel,
    on_device: bool,
) -> str | None:
    """What is wrong, or ``None``."""
    numel = math.prod(param.shape[1:])
    columns = min(numel, MANY_COLUMNS if numel % 8 == 0 else MANY_COLUMNS - 1)
    shapes = [(SOME_ROWS, columns)]
    if len(param) >= MANY_ROWS:
        shapes.append((MORE_ROWS, min(columns, 136 if numel % 8 == 0 else 131)))
    try:
        for shape in shapes:
            of_case = LayerRecord(
                layer.fqn, layer.seed, shape if param.ndim > 1 else shape[:1], layer.signed, layer.codecs
            )
            expected = _stepped(rule, of_case, param.dtype, torch.device("cpu"), group, sparse, None, False)
            found = _stepped(rule, of_case, param.dtype, param.device, group, sparse, kernel, on_device)
            start = _start(of_case, param.dtype)
            dtypes = {value.dtype for value in expected.values()}
            halves = torch.bfloat16 in (param.dtype, *dtypes)
            for name, value in expected.items():
                half = torch.bfloat16 in (param.dtype, value.dtype)
                reach = float(value.abs().max()) * (CLOSE_BFLOAT16 if half else CLOSE)
                if name == PARAMETER and halves:
                    reach += float((value - start).abs().max()) * CLOSE_BFLOAT16  # by other roundings of the moments
                allowed = max(1.0, OTHER_CODES * value.numel()) if torch.uint8 in dtypes else 0.0
                near = torch.isclose(found[name].cpu(), value, rtol=0, atol=reach)
                if near.logical_not().count_nonzero() > allowed:
                    return f"{name} is not the reference's in a case of {list(shape)}"
    except Exception as error:  # whatever compilers and drivers raise
        return f"{type(error).__name__}: {error}"[:300]
    return None


def _stepped(
    rule: UpdateRule,
    layer: LayerRecord,
    dtype: torch.dtype,
    device: torch.device,
    group: Mapping[str, Any],
    sparse: bool,
    kernel: kernels.FusedKernel | None,
    on_device: bool,
) -> dict[str, Tensor]:
    """A parameter and its states after steps that leave out a row; without a kernel the reference's."""
    generator = torch.Generator().manual_seed(0)
    shard = Shard.whole(layer.shape)
    part = LayerPart(layer, shard)
    param = _start(layer, dtype).to(device)
    tensors = part.allocate(param, group)
    bound = BoundPart.bind(part, param, group, tensors, on_device=on_device)
    rows = torch.arange(0, len(param), 3, device="cpu") if sparse else None
    count = len(param) if rows is None else len(rows)
    scales = torch.logspace(-3, 1, count, device="cpu").view(-1, *[1] * (param.ndim - 1))
    for step in range(1, STEPS + 1):
        values = torch.randn(count, *layer.shape[1:], generator=generator, device="cpu") * scales
        values[step] = math.nan
        gradient = RowGradient(shard, None if rows is None else rows.to(device), values.to(device, dtype))
        one = bound.step(
            gradient, rule.numbers(group, step), step, maximize=bool(group.get("maximize")), leave_out=True
        )
        if on_device:
            steps = torch.full((1,), step, dtype=torch.float64, device=device)
            one.step, one.on_device = steps[0], DeviceNumbers(steps[0])
            (one.numbers,) = numbers_of(rule, group, steps)
        if kernel is not None and one.fusable() and rule.fusable(one.states):
            one.fused = True
            kernel([rule.fuse(one)])
        else:
            rule.reference(one)
            gradient.forget_blocks()
    return {PARAMETER: param} | {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def _start(layer: LayerRecord, dtype: torch.dtype) -> Tensor:
    return torch.randn(layer.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(dtype)
