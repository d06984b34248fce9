"""The errors of benchmarks/long_run.py are those of the states that it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.long_run import CASES, WIDTH, WORDS, Case, Exact, Shadow, checkpoints, compare, run, summarised
from lightning_sketch import CountSketch
from lightning_sketch.sharding import Block, Shard


def record(steps: int, rows: int = 20) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randperm(100, generator=generator)[:rows].sort().values for _ in range(steps)]
    return [(each, torch.randn(rows, WIDTH, generator=generator)) for each in ids]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("moment", ["first", "second"])
def test_exact_states_are_what_a_table_of_all_rows_holds(moment, lazy):
    exact, shard = Exact(moment, lazy), Shard.whole((WORDS + 1, WIDTH))
    shadow = Shadow(Case("", moment, CountSketch(width=WORDS + 1, lazy=lazy)))
    for step, (rows, gradient) in enumerate(record(300), start=1):
        x = gradient if moment == "first" else gradient.square()
        found = shadow.step(step, Block(shard, rows, slice(0, len(rows))), rows, x, reads=True)
        torch.testing.assert_close(found, exact.step(rows, x).float(), rtol=1e-4, atol=1e-6)


def test_a_step_is_off_by_the_root_of_the_moments_ratio():
    exact = torch.tensor([[1.0, 4.0], [9.0, 1.0]], dtype=torch.float64)
    figures = summarised([compare(4 * exact, exact, "second")])
    assert figures["step_factor"] == pytest.approx(2.0)
    assert figures["step_bias"] == pytest.approx(0.5)
    assert figures["step_spread"] == pytest.approx(1.0)
    assert figures["median_error"] == pytest.approx(3.0)


def test_powers_of_ten_are_reported_over_the_steps_before():
    assert {at: (window[0], window[-1]) for at, window in checkpoints(1_000).items()} == {
        1: (1, 1),
        10: (9, 10),
        100: (90, 100),
        1_000: (951, 1_000),
    }


def test_every_case_is_measured_at_every_reported_step():
    found = run(record(7), 10)
    assert found.keys() == CASES.keys()
    assert all(set(case["at"]) == {"1", "10"} for case in found.values())
    # At the first step only the paper's rule, whose mean is of touched rows, could differ, and it does not.
    assert found["paper5_touched"]["at"]["1"]["step_factor"] == pytest.approx(1.0, abs=1e-3)
