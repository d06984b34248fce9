"""``CountSketch(update="paper")``: Algorithms 2 to 4 of Spring et al., ICML 2019."""

from __future__ import annotations

import statistics

import pytest
import torch

from lightning_sketch import CountSketch
from lightning_sketch.kernels.reference import hash_rows
from tests.codecs.harness import Driver, make_spec, sparse_steps

PAPER = CountSketch(width=2, depth=1, update="paper")


def _colliding_rows(count: int, spec, codec: CountSketch) -> torch.Tensor:
    buckets = hash_rows(torch.arange(spec.shard.global_rows), spec.seed, codec.depth, codec.width)[0][0]
    return (buckets == 1).nonzero().flatten()[:count]


def test_second_moment_worked_by_hand():
    """Algorithm 4, beta = 1/2, rows a and b in one bucket."""
    spec = make_spec((12, 1))
    a, b = _colliding_rows(2, spec, PAPER).split(1)
    driver = Driver(PAPER, spec)
    # query 0, delta = 1/2 (4 - 0) = 2
    assert driver.ema(torch.tensor([[4.0]]), a, beta=0.5).item() == 2.0
    # b is absent before but finds a's 2: delta = 1/2 (1 - 2) = -1/2
    assert driver.ema(torch.tensor([[1.0]]), b, beta=0.5).item() == 1.5
    # both query 1.5: deltas 1/2 (8 - 1.5) = 3.25 and 1/2 (0 - 1.5) = -0.75 add up
    assert driver.ema(torch.tensor([[8.0], [0.0]]), torch.cat([a, b]), beta=0.5).tolist() == [[4.0], [4.0]]


def test_first_moment_worked_by_hand():
    """Algorithm 2, momentum 1/2: delta = (1/2 - 1) estimate + g, inserted with the row's sign."""
    spec = make_spec((12, 1), signed=True)
    a, b = _colliding_rows(2, spec, PAPER).split(1)
    sign = hash_rows(torch.arange(12), spec.seed, 1, 2)[1][0]
    same = float(sign[a] * sign[b])
    driver = Driver(PAPER, spec)
    assert driver.step(torch.tensor([[4.0]]), a, decay=0.5).item() == 4.0
    assert driver.step(torch.tensor([[-2.0]]), a, decay=0.5).item() == 0.0
    assert driver.step(torch.tensor([[3.0]]), a, decay=0.5).item() == 3.0
    assert driver.step(torch.tensor([[1.0]]), b, decay=0.5).item() == same * 3 + (1 - 0.5 * same * 3)


def test_a_second_moment_is_never_negative():
    """Three rows of one bucket that all see zero take half of the estimate away each: 1 - 3/2 < 0."""
    spec = make_spec((12, 1))
    rows = _colliding_rows(3, spec, PAPER)
    driver = Driver(PAPER, spec)
    driver.step(torch.tensor([[1.0]]), rows[:1])
    assert driver.ema(torch.zeros(3, 1), rows, beta=0.5).tolist() == [[0.0]] * 3
    assert bool((driver.state >= 0).all())


def test_absent_rows_do_not_decay():
    driver = Driver(CountSketch(width=12, update="paper"), make_spec((12, 1)))
    driver.ema(torch.tensor([[4.0]]), torch.tensor([3]))
    for _ in range(10):
        driver.ema(torch.tensor([[1.0]]), torch.tensor([5]))
    assert driver.state[3].item() == pytest.approx(0.4)


def test_a_sum_equals_the_linear_sketch():
    """Adagrad (Algorithm 3): without decay there is nothing to query."""
    paper, linear = (Driver(CountSketch(width=5, update=update), make_spec((30, 2))) for update in ("paper", "linear"))
    for rows, x in sparse_steps(30, 2, steps=5, touched=9):
        torch.testing.assert_close(paper.step(x.square(), rows), linear.step(x.square(), rows))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_equals_the_algorithm_in_plain_python(depth, signed):
    codec, spec = CountSketch(width=4, depth=depth, update="paper"), make_spec((30, 2), signed=signed)
    driver, slow = Driver(codec, spec), _SlowSketch(depth, 4, 2, spec.seed, signed)
    for rows, x in sparse_steps(30, 2, steps=12, touched=7):
        x = x if signed else x.square()
        found = driver.ema(x, rows)
        slow.update(rows.tolist(), x.tolist(), beta=0.9)
        torch.testing.assert_close(found, torch.tensor([slow.query(row) for row in rows.tolist()]))


class _SlowSketch:
    """Lists and loops. UPDATE(i, delta): add to every depth. QUERY(i): median with signs, or minimum without."""

    def __init__(self, depth: int, width: int, dim: int, seed: int, signed: bool) -> None:
        self.table = [[[0.0] * dim for _ in range(width)] for _ in range(depth)]
        self.depth, self.width, self.dim, self.seed, self.signed = depth, width, dim, seed, signed

    def _places(self, row: int) -> list[tuple[int, int]]:
        buckets, signs = hash_rows(torch.tensor([row]), self.seed, self.depth, self.width)
        return [(int(b), int(s) if self.signed else 1) for b, s in zip(buckets[:, 0], signs[:, 0], strict=True)]

    def query(self, row: int) -> list[float]:
        found = [[s * x for x in self.table[d][b]] for d, (b, s) in enumerate(self._places(row))]
        if self.signed:
            return [statistics.median(column) for column in zip(*found, strict=True)]
        return [max(0.0, min(column)) for column in zip(*found, strict=True)]

    def update(self, rows: list[int], values: list[list[float]], beta: float) -> None:
        deltas = [
            [(1 - beta) * (x - m) for x, m in zip(value, self.query(row), strict=True)]
            for row, value in zip(rows, values, strict=True)
        ]
        for row, delta in zip(rows, deltas, strict=True):
            for d, (b, s) in enumerate(self._places(row)):
                for column in range(self.dim):
                    self.table[d][b][column] += s * delta[column]
