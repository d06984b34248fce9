"""A gradient as rows, whether torch gave it dense or sparse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.gradient import RowGradient, row_gradient

SHARD = Shard((6, 2), 0, 6)


def _coo(rows: list[int], values: torch.Tensor, shape: tuple[int, ...] = (6, 2)) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, shape)


def test_a_dense_gradient_is_all_rows_without_a_copy():
    grad = torch.randn(6, 2)
    found = row_gradient(grad, SHARD, "w")
    assert found.rows is None
    assert found.values.data_ptr() == grad.data_ptr()


def test_a_scalar_is_one_row():
    found = row_gradient(torch.tensor(3.0), Shard((), 0, 1), "w")
    assert found.values.tolist() == [3.0]


def test_duplicates_are_summed_and_rows_sorted():
    grad = _coo([4, 1, 4, 0], torch.tensor([[1.0, 2], [3, 4], [10, 20], [5, 6]]))
    found = row_gradient(grad, SHARD, "w")
    assert found.rows.tolist() == [0, 1, 4]
    assert found.values.tolist() == [[5, 6], [3, 4], [11, 22]]
    assert not grad.is_coalesced()  # the caller's tensor is as it was


def test_an_empty_sparse_gradient_has_no_rows_and_no_blocks():
    found = row_gradient(_coo([], torch.zeros(0, 2)), SHARD, "w")
    assert found.rows.numel() == 0
    assert found.blocks == ()


@pytest.mark.parametrize("sparse", [False, True])
def test_what_an_embedding_gives(sparse):
    embedding = nn.Embedding(6, 2, sparse=sparse)
    embedding(torch.tensor([[3, 1], [3, 3]])).sum().backward()
    found = row_gradient(embedding.weight.grad, SHARD, "emb.weight")
    dense = torch.zeros(6, 2)
    dense[found.rows if sparse else slice(None)] = found.values
    assert dense[:, 0].tolist() == [0, 1, 0, 3, 0, 0]


def test_rows_of_more_dimensions_and_vectors():
    found = row_gradient(_coo([2, 2], torch.ones(2, 3, 4), (5, 3, 4)), Shard((5, 3, 4), 0, 5), "w")
    assert found.values.shape == (1, 3, 4)
    assert row_gradient(_coo([2, 0], torch.ones(2), (5,)), Shard((5,), 0, 5), "w").values.shape == (2,)


def test_a_gradient_sparse_in_its_elements_is_refused_by_name():
    grad = torch.eye(3).to_sparse()
    with pytest.raises(TypeError, match=r"gradient of emb.weight is sparse in 2 dimensions"):
        row_gradient(grad, Shard((3, 3), 0, 3), "emb.weight")


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layouts_are_refused_by_name():
    with pytest.raises(TypeError, match=r"gradient of emb.weight has layout torch.sparse_csr"):
        row_gradient(torch.eye(3).to_sparse_csr(), Shard((3, 3), 0, 3), "emb.weight")


def test_touched_only_leaves_out_rows_of_zeros():
    values = torch.zeros(6, 2)
    values[1, 1], values[4, 0] = -1.0, float("nan")
    found = RowGradient(SHARD, None, values).touched_only()
    assert found.rows.tolist() == [1, 4]
    torch.testing.assert_close(found.values, values[[1, 4]], equal_nan=True)


def test_touched_only_keeps_what_is_sparse_already():
    """Its rows were touched, even if their gradient cancelled out."""
    gradient = row_gradient(_coo([1, 1, 3], torch.tensor([[1.0, 1], [-1, -1], [2, 2]])), SHARD, "w")
    assert gradient.touched_only().rows.tolist() == [1, 3]


def test_touched_only_leaves_out_rows_that_are_not_finite_if_asked():
    values = torch.zeros(6, 2)
    values[1, 1], values[4, 0], values[5] = -1.0, float("nan"), torch.finfo(values.dtype).max
    found = RowGradient(SHARD, None, values).touched_only(leave_out=True)
    assert (found.rows.tolist(), int(found.left_out)) == ([1, 5], 1)
    found = RowGradient(SHARD, torch.tensor([0, 2, 3]), values[3:]).touched_only(leave_out=True)
    assert (found.rows.tolist(), int(found.left_out)) == ([0, 3], 1)
    assert torch.equal(found.values, values[[3, 5]])


def test_touched_only_of_no_elements():
    gradient = RowGradient(Shard((0, 2), 0, 0), None, torch.zeros(0, 2))
    found = gradient.touched_only()
    assert found.rows is not None
    assert found.rows.numel() == found.values.numel() == 0


def test_blocks_are_made_once():
    """A block remembers its rows' hashes between the passes of a step."""
    gradient = RowGradient(SHARD, torch.tensor([1, 2]), torch.zeros(2, 2))
    assert gradient.blocks is gradient.blocks
