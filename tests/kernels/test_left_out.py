"""The look at gradients makes the sums of squares that some steps begin with: same verdict, same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from lightning_sketch import BFloat16, Codec, Factored, Policy, RowWise, Rule, compress
from lightning_sketch.kernels import all_finite, native
from lightning_sketch.kernels.fused import FusedStep, Kind
from tests.kernels.fused_cases import by_isa, threads
from tests.tiny import assert_same, default_dtype

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")

INSTRUCTION_SETS = range(native.library().lightning_sketch_isa() + 1) if native.library() else ()
SECOND = [RowWise(), RowWise(compression=4), Factored()]
KINDS = [Kind.NONE, Kind.ROW_SKETCH, Kind.FACTORED]
SHAPES = [(1, 1), (3, 5), (1000, 7), (40_000, 3), (300, 1029), (2, 70_000)]


def train(
    second: Codec, rows: int, columns: int, nonfinite: str, *, sparse: bool = False, dtype=torch.float32, cls=AdamW
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    initial = torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(dtype)
    table = nn.Embedding(rows, columns, sparse=sparse, _weight=initial)
    policy = Policy([Rule(name="*", first_moment=BFloat16(), second_moment=second)])
    optimizer = compress(cls(table.parameters(), lr=0.1, weight_decay=0.1), table, policy, nonfinite=nonfinite)
    for _ in range(3):
        gradient = torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(dtype)
        if sparse:
            ids = torch.randperm(rows, generator=generator)[: rows // 2 + 1]
            gradient = torch.sparse_coo_tensor(ids[None], gradient[ids], (rows, columns), check_invariants=True)
        table.weight.grad = gradient
        optimizer.step()
    states = {key: value for key, value in optimizer.state[table.weight].items() if key != "step"}
    return {"weight": table.weight.detach()} | states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (300, 1029), (40_000, 3)], ids=str)
@pytest.mark.parametrize("second", SECOND, ids=repr)
def test_same_bits_with_and_without_a_look_beforehand(
    second: Codec, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    expected = train(second, *shape, "propagate", dtype=dtype)
    for number in INSTRUCTION_SETS:
        for count in (1, 3):
            with by_isa(number), threads(count):
                assert_same(train(second, *shape, "raise", dtype=dtype), expected)


@pytest.mark.parametrize("second", SECOND, ids=repr)
def test_same_bits_with_sparse_gradients(second: Codec) -> None:
    expected = train(second, 500, 9, "propagate", sparse=True)
    assert_same(train(second, 500, 9, "raise", sparse=True), expected)


@pytest.mark.parametrize("second", SECOND, ids=repr)
def test_with_coupled_weight_decay_they_are_of_something_else(second: Codec, fused: list[FusedStep]) -> None:
    found = train(second, 60, 9, "raise", cls=Adam)
    assert [taken.sums for taken in fused] == [None] * 3
    assert_same(found, train(second, 60, 9, "propagate", cls=Adam))


@pytest.mark.parametrize(("second", "made"), list(zip(SECOND, [False, True, True], strict=True)))
def test_they_are_made_for_those_that_read_the_gradient_twice(
    second: Codec, made: bool, fused: list[FusedStep]
) -> None:
    train(second, 60, 9, "raise")
    assert [taken.sums is not None for taken in fused] == [False, made, made]  # the first step has nothing bound yet
    fused.clear()
    train(second, 60, 9, "propagate")
    assert [taken.sums for taken in fused] == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_is_of_every_element(kind: Kind, bad: float, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES:
        good = torch.randn(rows, columns).to(dtype)
        for at in {0, columns - 1, (rows // 2) * columns, rows * columns - 1}:
            spoiled = good.clone()
            spoiled.view(-1)[at] = bad
            found, _ = all_finite([good, spoiled, good], [kind, kind, Kind.NONE])
            assert found == [True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_squares_that_overflow_are_no_verdict(kind: Kind) -> None:
    large = torch.randn(600, 33)
    large[[0, 300, 599], [1, 32, 0]] = torch.tensor([1e30, -3e38, 2e19])
    spoiled = large.clone()
    spoiled[599, 1] = float("nan")
    assert all_finite([large, spoiled], [kind, kind])[0] == [True, False]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_they_are(shape: tuple[int, int]) -> None:
    rows, columns = shape
    gradient = torch.randn(shape)
    _, (means, both, nothing) = all_finite([gradient] * 3, [Kind.ROW_SKETCH, Kind.FACTORED, Kind.NONE])
    assert nothing is None
    for sums in (means, both):
        torch.testing.assert_close(sums[:rows], gradient.square().mean(dim=1))
    padded = -(-rows // 16) * 16
    torch.testing.assert_close(both[padded:].view(-1, columns).sum(dim=0), gradient.square().sum(dim=0))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("second", SECOND, ids=repr)
def test_torchs_default_dtype_and_device_are_not_theirs(second: Codec, default: torch.dtype) -> None:
    expected = train(second, 2000, 9, "raise")
    with default_dtype(default):
        with torch.device("meta"):
            sums = all_finite([torch.ones(2000, 9, device="cpu", dtype=torch.float32)], [Kind.FACTORED])[1][0]
        assert sums is not None
        assert (sums.dtype, sums.device.type) == (torch.float32, "cpu")
        found = train(second, 2000, 9, "raise")
    assert_same(found, expected)


def test_an_empty_gradient_has_none() -> None:
    assert all_finite([torch.empty(0, 3)], [Kind.FACTORED]) == ([True], [None])
