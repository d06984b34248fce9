"""Triton kernels in the interpreter: what is not finite is left out, and no order of programs changes a bit.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from triton.runtime import interpreter

from lightning_sketch import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
)
from lightning_sketch import kernels as package_kernels
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.kernels.triton import launch, launches, layout

ROWS, COLUMNS = 14, 21
#: Rows that are not finite, in each of two steps.
BAD = ([3, 6, 7, 13], [0, 10])
BY_ROWS: list[tuple[Codec, Codec]] = [
    (RowWise(), Drop()),
    (RowWise(), BFloat16()),
    (RowWise(), CountSketch(compression=4)),
    (RowWise(compression=4), Drop()),
    (RowWise(compression=4), BFloat16()),
    (SM3(), Drop()),
    (SM3(), BFloat16()),
    (Factored(), Drop()),
    (Factored(), BFloat16()),
    (Factored(), CountSketch(compression=4)),
    (CountSketch(compression=4), Drop()),
    (CountSketch(compression=4), CountSketch(compression=4)),
    (BFloat16(), CountSketch(compression=4)),
    (RowWise(), Quantized()),
    (Quantized(bits=4, block=16), Quantized(block=16)),
]
BY_ELEMENTS: list[tuple[Codec, Codec]] = [
    (BFloat16(), BFloat16()),
    (BFloat16(stochastic=False), Drop()),
    (Keep(), BFloat16()),
    (CountSketch(width=10_000), Keep()),
]


@pytest.fixture(autouse=True)
def left_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Have every step done by the Triton kernels, and see how much they leave out."""
    seen: list[Tensor] = []

    def step(steps: Sequence[FusedStep]) -> Tensor:
        for each in steps:
            each.leave_out = True
        seen.append(launch.step(steps).clone())
        return seen[-1]

    monkeypatch.setattr(package_kernels, "fused_kernel", lambda device: step)
    return seen


def _train(
    second: Codec,
    first: Codec,
    spoil: Callable[[Tensor, list[int]], Tensor],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A table and its states after two steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    layer = nn.Embedding(ROWS, COLUMNS, _weight=weight)
    policy = Policy([Rule(name="*", first_moment=first, second_moment=second)])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    compress(optimizer, layer, policy, nonfinite="propagate")
    for bad in BAD:
        layer.weight.grad = spoil(torch.randn(ROWS, COLUMNS, generator=generator).to(dtype), bad)
        optimizer.step()
    return {"weight": layer.weight.detach().clone()} | dict(optimizer.state[layer.weight])


def _spoiled(grad: Tensor, bad: list[int]) -> Tensor:
    for number, row in enumerate(bad):
        if number % 3 == 0:
            grad[row, number % grad.shape[1]] = math.nan
        elif number % 3 == 1:
            grad[row, -1] = -math.inf
        else:
            grad[row] = math.nan
    return grad


def _without(grad: Tensor, bad: list[int]) -> Tensor:
    """A sparse gradient without these rows."""
    rows = [row for row in range(ROWS) if row not in bad]
    return torch.sparse_coo_tensor(torch.tensor([rows]), grad[rows], grad.shape, check_invariants=True).coalesce()


@contextmanager
def _programs_in_order(order: Callable[[int], list[int]]) -> Iterator[None]:
    """Run the programs of every launch in another order."""
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def reordered(x: int, y: int, z: int) -> None:
        set_grid_idx(order(builder.grid_dim[0])[x], y, z)

    builder.set_grid_idx = reordered
    try:
        yield
    finally:
        builder.set_grid_idx = set_grid_idx


@pytest.mark.parametrize(("second", "first"), BY_ROWS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_left_out_is_one_that_is_absent(
    second: Codec, first: Codec, dtype: torch.dtype, left_out: list[Tensor]
) -> None:
    found = _train(second, first, _spoiled, dtype)
    assert [int(counts.sum()) for counts in left_out] == [len(bad) for bad in BAD]
    for key, expected in _train(second, first, _without, dtype).items():
        # Sums of columns are taken by chunks of rows, and without a row the chunks are others.
        close = isinstance(second, Factored) and dtype == torch.float32
        tolerance = 1e-6 if close else 0 if not isinstance(second, Factored) else 2**-7
        torch.testing.assert_close(found[key], expected, rtol=tolerance, atol=tolerance * 0.01, msg=key)


@pytest.mark.parametrize(("second", "first"), BY_ELEMENTS, ids=repr)
def test_elements_are_left_out_one_by_one(second: Codec, first: Codec, left_out: list[Tensor]) -> None:
    finite = _train(second, first, lambda grad, bad: grad)
    left_out.clear()
    found = _train(second, first, _spoiled)
    zeros = [_spoiled(torch.zeros(ROWS, COLUMNS), bad) for bad in BAD]
    assert [int(counts.sum()) for counts in left_out] == [int((~grad.isfinite()).sum()) for grad in zeros]
    rows = sorted({row for bad in BAD for row in bad})
    others = [row for row in range(ROWS) if row not in rows]
    assert torch.equal(found["weight"][others], finite["weight"][others])
    assert found["weight"].isfinite().all()
    assert not torch.equal(found["weight"][rows], finite["weight"][rows])


@pytest.mark.parametrize(("second", "first"), BY_ROWS[::2] + BY_ELEMENTS[::2], ids=repr)
def test_the_order_of_programs_changes_no_bit(second: Codec, first: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TILE": 128, "OBSERVED_COLUMNS": 64, "FEWER_OBSERVED_ROWS": 4, "TILE_SKETCH": 4}.items():
        monkeypatch.setattr(layout, name, value)  # four programs or more of each kernel
    monkeypatch.setattr(launches, "TILE_SKETCH", layout.TILE_SKETCH)
    expected = _train(second, first, _spoiled)
    for order in (
        lambda count: list(range(count))[::-1],
        lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist(),
    ):
        with _programs_in_order(order):
            found = _train(second, first, _spoiled)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("second", [RowWise(), RowWise(compression=4), SM3(), CountSketch(compression=4)])
def test_squares_that_overflow_are_not_left_out(second: Codec, left_out: list[Tensor]) -> None:
    def huge(grad: Tensor, bad: list[int]) -> Tensor:
        grad[bad] = 1e30
        return grad

    found = _train(second, Drop(), huge)
    assert not any(counts.any() for counts in left_out)
    assert found["weight"].isfinite().all()


@pytest.mark.parametrize("value", [1e30, 3e14])
@pytest.mark.parametrize("first", [Drop(), BFloat16()])
def test_huge_squares_are_left_out_where_all_rows_share_them(
    first: Codec, value: float, left_out: list[Tensor]
) -> None:
    def huge(grad: Tensor, bad: list[int]) -> Tensor:
        grad[bad] = value
        return grad

    found = _train(Factored(floor=1.0), first, huge)
    assert all(counts.any() for counts in left_out)
    for key, expected in _train(Factored(floor=1.0), first, _spoiled).items():
        assert torch.equal(found[key], expected), key


def test_every_row_may_be_left_out(left_out: list[Tensor]) -> None:
    for second in (RowWise(), RowWise(compression=4), SM3(), Factored()):
        start = _train(second, Drop(), lambda grad, bad: torch.full_like(grad, math.nan))
        assert [int(counts.sum()) for counts in left_out[-2:]] == [ROWS] * 2
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(start["weight"], torch.randn(ROWS, COLUMNS, generator=generator))


def test_layers_of_one_launch_are_counted_apart(left_out: list[Tensor]) -> None:
    model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in ((9, 40), (1, 33), (30, 64)) * 4)
    policy = Policy([Rule(name="*", first_moment=Drop(), second_moment=Factored())])
    optimizer = torch.optim.AdamW(model.parameters())
    compress(optimizer, model, policy, nonfinite="propagate")
    for number, param in enumerate(model.parameters()):
        param.grad = torch.randn_like(param)
        param.grad[: number % 3] = math.nan
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step()
    (counts,) = left_out
    assert counts.tolist() == [min(number % 3, len(param)) for number, param in enumerate(model.parameters())]
    for number, (param, was) in enumerate(zip(model.parameters(), before, strict=True)):
        same = (param == was).all(dim=1)
        assert same.tolist() == [row < number % 3 for row in range(len(param))]
