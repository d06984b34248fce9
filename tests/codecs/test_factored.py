"""Row means times column means."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Adagrad

from lightning_sketch import Factored, Policy, Rule, compress
from lightning_sketch.codecs import allocate, encode
from lightning_sketch.sharding import Shard
from tests.codecs.harness import Driver, make_spec

SHAPES = pytest.mark.parametrize("shape", [(), (6,), (6, 4), (6, 1), (1, 6), (4, 3, 2)], ids=str)


@SHAPES
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_equals_adafactor_in_plain_python(shape, decay):
    driver = Driver(Factored(), make_spec(shape))
    rows, columns = shape[0] if shape else 1, max(1, torch.Size(shape[1:]).numel())
    dense = [[0.0] * columns for _ in range(rows)]
    for _ in range(5):
        x = torch.rand(shape or (1,))
        for i, row in enumerate(x.reshape(rows, columns).tolist()):
            for j, value in enumerate(row):
                dense[i][j] = decay * dense[i][j] + 0.1 * value
        found = driver.step(x, decay=decay, weight=0.1).reshape(rows, columns)
        r = [sum(row) / columns for row in dense]
        c = [sum(row[j] for row in dense) / rows for j in range(columns)]
        mean = sum(c) / columns
        expected = torch.tensor([[r[i] * c[j] / mean for j in range(columns)] for i in range(rows)])
        torch.testing.assert_close(found, expected)


@SHAPES
def test_rank_one_states_are_exact(shape):
    row = torch.rand(shape[0] if shape else 1)
    dense = row.view(-1, *[1] * (max(1, len(shape)) - 1)) * (torch.rand(shape[1:]) + 0.1 if shape[1:] else 1.0)
    driver = Driver(Factored(), make_spec(shape))
    for _ in range(10):
        torch.testing.assert_close(driver.step(dense, decay=0.5, weight=0.5), dense * (1 - 0.5**driver.steps))


@SHAPES
def test_a_floor_adds_the_mean_of_all_rows_to_each(shape):
    plain, floored = (Driver(codec, make_spec(shape)) for codec in (Factored(), Factored(floor=3.0)))
    for _ in range(3):
        x = torch.rand(shape or (1,))
        found, without = floored.ema(x), plain.ema(x)
    columns = without.mean(dim=0, keepdim=True)  # row means and column means of the product are those it is made of
    torch.testing.assert_close(found, without + 3 * columns)
    assert floored.state.tolist() == plain.state.tolist()  # it is of steps, and not of what is stored


def test_a_floor_holds_back_the_first_step_of_a_rare_row():
    def moved(floor):
        model = nn.ParameterDict({"table": torch.zeros(10, 4)})
        optimizer = Adagrad(model.parameters(), lr=1.0, eps=0.0)
        optimizer = compress(optimizer, model, Policy([Rule(name="table", sum=Factored(floor=floor))]))
        values = torch.tensor([[1.0] * 4, [0.01] * 4])  # a frequent row's, a rare one's
        model.table.grad = torch.sparse_coo_tensor(torch.tensor([[3, 7]]), values, (10, 4), check_invariants=True)
        optimizer.step()
        return model.table[:, 0].tolist()

    free, held = moved(0.0), moved(10.0)
    assert free[3] == pytest.approx(free[7], rel=1e-5)  # the sign alone
    assert abs(held[7]) < 0.02 * abs(held[3])
    assert abs(held[3]) == pytest.approx(abs(free[3]) / (2 + 1e-4) ** 0.5, rel=1e-3)  # ten means of ten rows: one more


@pytest.mark.parametrize("floor", [-1.0, float("inf"), float("nan"), 10**400])
def test_a_floor_is_a_number_that_nothing_overflows_by(floor):
    with pytest.raises(ValueError, match=rf"Factored\(floor={floor}\): must be in \[0, 1e\+06\]"):
        Factored(floor=floor)


def test_nothing_yet_is_zero():
    driver = Driver(Factored(), make_spec((4, 3)))
    assert driver.ema(torch.zeros(4, 3)).tolist() == torch.zeros(4, 3).tolist()
    assert driver.state.tolist() == torch.zeros(4, 3).tolist()


def test_row_means_of_shards_concatenate_and_column_means_add_up():
    dense = torch.rand(10, 3)
    whole = encode(Factored(), make_spec((10, 3)), dense)
    parts = [
        encode(Factored(), make_spec((10, 3), shard=Shard((10, 3), start, size)), dense[start : start + size])
        for start, size in [(0, 7), (7, 3)]
    ]
    torch.testing.assert_close(torch.cat([p["exp_avg_sq_row"] for p in parts]), whole["exp_avg_sq_row"])
    torch.testing.assert_close(sum(p["exp_avg_sq_col"] for p in parts), whole["exp_avg_sq_col"])


def test_the_state_is_rows_plus_columns():
    tensors = allocate(Factored(), make_spec((100, 8, 4)))
    assert tensors["exp_avg_sq_row"].shape == (100,)
    assert tensors["exp_avg_sq_col"].shape == (8, 4)
