"""Which rows are watched."""

from __future__ import annotations

import torch

from lightning_sketch.monitor.sample import choose_rows, take_rows
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.gradient import RowGradient

SHARD = Shard.whole((1000, 4))
OCCURRING = torch.arange(100, 200)


def sparse(rows=OCCURRING):
    return RowGradient(SHARD, rows, torch.ones(len(rows), 4))


def dense():
    values = torch.zeros(1000, 4)
    values[OCCURRING] = 1
    return RowGradient(SHARD, None, values)


def test_half_of_the_rows_have_a_gradient_and_half_are_of_all():
    for gradient in (sparse(), dense()):
        rows = choose_rows(gradient, seed=1, count=32)
        assert len(rows) == 32
        assert torch.equal(rows, rows.unique())
        occurring = ((rows >= 100) & (rows < 200)).sum()
        assert 16 <= occurring < 24


def test_a_dense_and_a_sparse_gradient_of_the_same_rows_choose_the_same():
    assert torch.equal(choose_rows(sparse(), 7, 32), choose_rows(dense(), 7, 32))
    assert not torch.equal(choose_rows(sparse(), 7, 32), choose_rows(sparse(), 8, 32))


def test_of_few_rows_all_are_taken():
    small = RowGradient(Shard.whole((5, 4)), None, torch.zeros(5, 4))
    assert torch.equal(choose_rows(small, 1, 32), torch.arange(5))
    assert len(choose_rows(RowGradient(Shard((5, 4), 5, 0), None, torch.zeros(0, 4)), 1, 32)) == 0


def test_rows_of_a_gradient_are_zero_where_it_has_none():
    values, present = take_rows(sparse(), torch.tensor([0, 150, 199, 999]), lazy=False)
    assert present.tolist() == [False, True, True, False]
    assert torch.equal(values, present.float()[:, None].expand(4, 4))
    values, present = take_rows(sparse(OCCURRING[:0]), torch.tensor([0, 150]), lazy=False)
    assert not present.any()
    assert values.shape == (2, 4)


def test_rows_of_zeros_are_absent_for_lazy_layers_alone():
    rows = torch.tensor([0, 150])
    assert take_rows(dense(), rows, lazy=False)[1] is None
    assert take_rows(dense(), rows, lazy=True)[1].tolist() == [False, True]
    nothing = RowGradient(Shard((1000, 4), 1000, 0), None, torch.zeros(0, 4))
    assert take_rows(nothing, rows[:0], lazy=True)[1].shape == (0,)
