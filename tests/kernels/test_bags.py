"""Rows added to sketches by `embedding_bag`, as on CUDA devices, against one level after the other."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch.kernels.bags import bag_sums, bags_bytes, sort_into_bags
from lightning_sketch.kernels.reference import hash_rows, over_rows, segment_add


@pytest.mark.parametrize("tail", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("rows", "cut_into"), [(1, 4), (50, 7), (50, 50), (48, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_blocks_are_those_of_every_level(dtype, rows, cut_into, signed, tail):
    depth, width = 3, 4
    values = torch.randn(rows, *tail, dtype=dtype)
    buckets, signs = hash_rows(torch.arange(rows), 7, depth, width)
    bags = sort_into_bags(buckets, signs, width, cut_into, dtype)
    expected = torch.zeros(depth, width, *tail, dtype=dtype)
    found = expected.clone()
    for start in range(0, rows, cut_into):
        span = slice(start, min(start + cut_into, rows))
        found += bag_sums(values[span], bags, (depth, width), span, cut_into, signed=signed)
    for level in range(depth):
        segment_add(
            expected[level], buckets[level], values * over_rows(signs[level], values.ndim) if signed else values
        )
    torch.testing.assert_close(found, expected)


def test_sorted_rows_are_counted_among_temporaries():
    buckets, signs = hash_rows(torch.arange(100), 7, 3, 9)
    bags = sort_into_bags(buckets, signs, 9, 30, torch.float32)
    assert sum(tensor.nbytes for tensor in bags) < bags_bytes(100, 3, 9, 4, 4)
