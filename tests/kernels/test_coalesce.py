"""Sums of a sparse gradient's rows, against ``index_add_`` in the same order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lightning_sketch.kernels import native
from lightning_sketch.kernels.coalesce import coalesce
from tests.kernels.fused_cases import threads

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")


def expected(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    rows, inverse = ids.unique(return_inverse=True)
    sums = torch.zeros(len(rows), *values.shape[1:])
    return rows, sums.index_add_(0, inverse, values.float()).to(values.dtype)


def check(ids: Tensor, values: Tensor) -> None:
    for found, wanted in zip(coalesce(ids, values), expected(ids, values), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    count=st.integers(1, 300),
    most=st.sampled_from([1, 2, 100, 3_000, 1 << 22, 1 << 32]),
    columns=st.sampled_from([1, 7, 16, 33, 64, 1024, 1030]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_sums_in_the_order_of_occurrence(count: int, most: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, most, (count,), generator=generator)
    check(ids, torch.randn(count, columns, generator=generator).to(dtype))


def test_the_same_bits_with_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(20_000, generator=generator).pow(3) * 50_000).long()  # a few are frequent
    values = torch.randn(20_000, 64, generator=generator)
    for number in (1, 2, 3):
        with threads(number):
            check(ids, values)


def test_rows_of_several_dimensions_of_none_and_of_views() -> None:
    ids = torch.tensor([3, 0, 3, 3])
    check(ids, torch.randn(4, 2, 5))
    check(ids, torch.randn(4))
    check(ids, torch.ones(1, 6).expand(4, 6))  # the gradient of a sum
    check(torch.tensor([[3, 9], [0, 9], [3, 9]])[:, 0], torch.randn(3, 2))
    check(torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    check(ids, torch.empty(4, 0))


@pytest.mark.parametrize("bad", [-1, 1 << 32])
def test_an_id_that_cannot_be_sorted(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"{bad}.*must be in \[0, 2\*\*32\)"):
        coalesce(torch.tensor([1, bad, 2]), torch.ones(3, 2))


def test_the_operator_is_what_it_says() -> None:
    opcheck(torch.ops.lightning_sketch.coalesce.default, (torch.tensor([2, 0, 2]), torch.randn(3, 4)))
