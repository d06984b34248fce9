"""Shards and blocks: which rows, in which order, with which global ids."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sketch.sharding import Block, Shard, shard_of
from lightning_sketch.sharding.base import BLOCK_NUMEL

cases = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (5, 3, 2), (0, 4)], ids=str)
def test_a_whole_parameter_is_its_own_shard(shape):
    shard = shard_of(nn.Parameter(torch.zeros(shape)), "w")
    assert shard.global_shape == shape
    assert (shard.row_offset, shard.local_rows) == (0, shape[0] if shape else 1)
    assert shard.global_rows == shard.local_rows
    assert shard.row_shape == shape[1:]
    assert shard.row_numel == math.prod(shape[1:])


def test_a_scalar_is_viewed_as_one_row_and_anything_else_as_it_is():
    scalar, matrix = torch.tensor(2.0), torch.zeros(3, 2)
    rows = shard_of(scalar, "w").as_rows(scalar)
    assert rows.shape == (1,)
    rows.fill_(5.0)
    assert scalar.item() == 5.0
    assert shard_of(matrix, "w").as_rows(matrix) is matrix


@cases
@given(
    rows=st.integers(0, 3000), row=st.integers(1, 2000), offset=st.sampled_from([0, 5, 2**40]), sparse=st.booleans()
)  # fmt: skip
def test_blocks_cover_every_row_once_in_order_and_are_small(rows, row, offset, sparse):
    shard = Shard((offset + rows, row), offset, rows)
    ids = torch.arange(0, rows, 3) if sparse else None
    blocks = list(shard.blocks(ids))
    covered = [i for b in blocks for i in b.row_ids(torch.device("cpu")).tolist()]
    assert covered == [i + offset for i in (range(0, rows, 3) if sparse else range(rows))]
    assert [b.span.start for b in blocks] == [0, *[b.span.stop for b in blocks[:-1]]][: len(blocks)]
    assert all(0 < b.size * row <= max(BLOCK_NUMEL, row) for b in blocks)


def test_a_row_larger_than_a_block_is_a_block():
    assert [b.size for b in Shard((3, BLOCK_NUMEL + 1), 0, 3).blocks()] == [1, 1, 1]


def test_rows_without_elements_make_no_blocks():
    assert list(Shard((3, 0), 0, 3).blocks()) == []
    assert list(Shard((3, 0), 0, 3).blocks(torch.tensor([1]))) == []


def test_row_ids_beyond_32_bits():
    shard = Shard((2**40, 4), 2**40 - 2, 2)
    assert next(shard.blocks()).row_ids(torch.device("cpu")).tolist() == [2**40 - 2, 2**40 - 1]
    sparse = next(shard.blocks(torch.tensor([1])))
    assert sparse.row_ids(torch.device("cpu")).tolist() == [2**40 - 1]
    assert sparse.row_ids(torch.device("cpu")).dtype == torch.int64


def test_sparse_blocks_remember_and_contiguous_ones_recompute():
    shard, calls = Shard((9, 2), 0, 9), []

    def make() -> int:
        calls.append(1)
        return len(calls)

    sparse = Block(shard, torch.tensor([1, 5]), slice(0, 2))
    assert [sparse.memo("key", make), sparse.memo("key", make), sparse.memo("other", make)] == [1, 1, 2]
    whole = Block(shard, slice(0, 9), slice(0, 9))
    assert [whole.memo("key", make), whole.memo("key", make)] == [3, 4]
