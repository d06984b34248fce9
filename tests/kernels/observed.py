"""What gradients add to sums of rows and columns, by the kernels and in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sketch.kernels import ObserveKernel
from lightning_sketch.kernels.schema import FusedStep, Observed, observation

#: Rows and columns: wider than a chunk, unaligned, one of either, none.
SHAPES = ((40, 16), (7, 50), (130, 1), (1, 9), (3, 1100), (0, 8))


def steps(dtype: torch.dtype, *, sparse: bool, leave_out: bool, device: str = "cpu") -> list[FusedStep]:
    """Observations of layers with and without columns; some rows are not finite, others overflow when squared."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (rows, columns) in enumerate(SHAPES):
        param = torch.randn(rows + 2, columns, generator=generator).to(dtype)
        grad = torch.randn(rows, columns, generator=generator).to(dtype)
        if rows > 2:
            grad[1, columns // 2] = torch.nan
            grad[2, 0] = torch.inf
        if rows > 3 and not leave_out:
            grad[1:3] = 1.0
        ids = torch.randperm(rows + 2, generator=generator)[:rows] if sparse else None
        param = param if sparse else param[:rows].contiguous()
        made.append(
            observation(
                param.to(device),
                grad.to(device),
                None if ids is None else ids.to(device),
                columns=bool(number % 2),
                weight_decay=0.1 * (number % 3),
                maximize=number == 2,
                leave_out=leave_out,
            )
        )
    return made


def check(observe: ObserveKernel, made: list[FusedStep]) -> None:
    """Compare with float64; parameters and gradients stay."""
    before = [(step.param.clone(), step.grad.clone()) for step in made]
    for found, step, (param, grad) in zip(observe(made), made, before, strict=True):
        _equal(found, step)
        assert torch.equal(step.param, param)
        assert torch.equal(step.grad.nan_to_num(), grad.nan_to_num())


def _equal(found: Observed, step: FusedStep) -> None:
    rows = step.param if step.ids is None else step.param[step.ids]
    g = step.grad.double() * (-1 if step.maximize else 1) + step.weight_decay * rows.double()
    good = step.grad.isfinite().all(dim=1) if step.leave_out else torch.ones(len(g), dtype=torch.bool)
    squares: Tensor = g.square()
    means = squares.mean(dim=1).where(good, torch.nan)
    torch.testing.assert_close(found.means.double(), means, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert (found.columns is None) == (step.second is not None and step.second.kind.name == "ROW_SKETCH")
    if found.columns is not None:
        torch.testing.assert_close(found.columns.double(), squares[good].sum(dim=0), rtol=1e-5, atol=1e-6)
