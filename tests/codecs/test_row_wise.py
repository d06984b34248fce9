"""One second moment per row."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch import CountSketch, RowWise
from lightning_sketch.codecs import allocate
from tests.codecs.harness import Driver, make_spec, sparse_steps


@pytest.mark.parametrize("shape", [(), (8,), (8, 3), (8, 3, 2)], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_equals_the_mean_over_the_row_of_the_dense_state(shape, decay):
    driver, dense = Driver(RowWise(), make_spec(shape)), torch.zeros(shape or (1,))
    for _ in range(6):
        x = torch.rand(shape or (1,))
        dense = decay * dense + 0.5 * x
        found = driver.step(x, decay=decay, weight=0.5)
        rows = [float(row.mean()) for row in dense]
        for row, mean in enumerate(rows):
            torch.testing.assert_close(found[row], torch.full_like(found[row], mean))


def test_lazy_rows_decay_only_when_touched():
    driver, lazy = Driver(RowWise(lazy=True), make_spec((10, 2))), torch.zeros(10)
    for rows, x in sparse_steps(10, 2, steps=12, touched=3):
        lazy[rows] = 0.9 * lazy[rows] + 0.1 * x.square().mean(dim=1)
        torch.testing.assert_close(driver.ema(x.square(), rows), lazy[rows, None].expand(3, 2))
    torch.testing.assert_close(driver.state[:, 0], lazy)


@pytest.mark.parametrize("lazy", [False, True])
def test_compressed_rows_are_a_count_min_sketch_of_the_row_means(lazy):
    codec = RowWise(compression=5, depth=2, lazy=lazy)
    rowwise = Driver(codec, make_spec((50, 4)))
    sketch = Driver(CountSketch(compression=5, depth=2, lazy=lazy), make_spec((50,)))
    for rows, x in sparse_steps(50, 4, steps=8, touched=9):
        found = rowwise.ema(x.square(), rows)
        means = sketch.ema(x.square().mean(dim=1), rows)
        torch.testing.assert_close(found, means[:, None].expand(9, 4))
    assert torch.equal(rowwise.tensors["exp_avg_sq_table"], sketch.tensors["exp_avg_sq_table"])


@pytest.mark.parametrize(
    ("codec", "floats"), [(RowWise(), 1000), (RowWise(compression=10), 3 * 34), (RowWise(compression=10, depth=1), 100)]
)
def test_the_state_is_at_most_one_number_per_row(codec, floats):
    tensors = allocate(codec, make_spec((1000, 64)))
    assert sum(t.numel() for t in tensors.values()) == floats + 1  # and the scale


@pytest.mark.parametrize("options", [{"compression": 0.5}, {"compression": 2, "depth": 0}, {"depth": 2}])
def test_options_are_validated(options):
    with pytest.raises(ValueError, match=r"^RowWise\("):
        RowWise(**options)
