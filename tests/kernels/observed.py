"""What gradients add to sums of rows and columns, and steps by states that hold these sums already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_sketch.kernels import ObserveKernel
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.reference import gather_min, hash_rows
from lightning_sketch.kernels.schema import FusedStep, KernelState, Observed, observation

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


def held_step(kind: Kind, *, first: bool, sparse: bool, device: str = "cpu") -> tuple[FusedStep, Tensor]:
    """A step by a second state that holds it already, and what the parameter is then, in float64.

    One row of the gradient is not finite, and one overflows when squared.
    """
    generator = torch.Generator().manual_seed(int(kind))
    rows, columns, k = 23, 33, 9 if sparse else 23

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float32) + 0.1

    ids = torch.randperm(rows, generator=generator)[:k] if sparse else None
    param, grad = random(rows, columns), random(k, columns)
    grad[4, 30], grad[5, 7] = torch.nan, 1e30
    data, of_columns, row_ids = random(rows), random(columns), torch.arange(rows) if ids is None else ids
    if kind == Kind.ROW_SKETCH:
        data = random(3, 5)
        v = gather_min(data, hash_rows(row_ids, 7, 3, 5)[0])[:, None].double()
    else:
        v = data[row_ids][:, None].double()
        if kind == Kind.FACTORED:
            v = v * (of_columns / of_columns.mean()).double()
    moment, m = random(rows, columns), grad.double()
    if first:
        m = moment[row_ids].double() * 0.5 + 0.25 * m
    good = grad.isfinite().all(dim=1, keepdim=True)
    expected = param.double()
    before = expected[row_ids]
    expected[row_ids] = (before * 0.75 - 0.1 * m / ((v * 2.0).sqrt() * 1.5 + 1e-3)).where(good, before)
    second = KernelState(
        kind,
        data.to(device),
        of_columns.to(device) if kind == Kind.FACTORED else None,
        weight=0.0,
        scale=2.0,
        depth=3,
        width=5,
        seed=7,
    )
    of_first = KernelState(Kind.DENSE, moment.to(device), decay=0.5, weight=0.25) if first else None
    return FusedStep(
        param.to(device),
        grad.to(device),
        None if ids is None else ids.to(device),
        0,
        0,
        second,
        of_first,
        None,
        0.1,
        decay_factor=0.75,
        eps=1e-3,
        correction=1.5,
        leave_out=True,
    ), expected


def check_held(step: Callable[[Sequence[FusedStep]], Tensor], made: FusedStep, expected: Tensor) -> None:
    """The parameter is what is expected, and the second state stays."""
    assert made.second is not None
    before = made.second.data.clone()
    assert step([made]).tolist() == [1]
    torch.testing.assert_close(made.param.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.second.data, before)
