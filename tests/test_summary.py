"""Figures of a benchmark add up over machines: a row is replaced only by one of as many seeds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import summary

METHODS = {"exact": ("exact", 1e-8), "small": ("small", 1e-8)}


def runs(method: str, quality: float | None, *, seeds: int) -> list[dict[str, Any]]:
    """Three rates, of which 0.2 is best, and that one with `seeds` seeds; None: a seed diverged."""
    made = []
    for lr, seed in [(0.1, 0), (0.4, 0), *((0.2, seed) for seed in range(seeds))]:
        of_test = quality if lr == 0.2 else 90.0
        setting = {"method": method, "lr": lr, "eps": 1e-8, "seed": seed}
        valid = 50.0 if lr == 0.2 else 90.0
        made.append({"setting": setting, "valid": valid, "test": of_test, "state_bytes": 8, "seconds": {"train": 1.0}})
    return made


@pytest.fixture
def written(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    monkeypatch.setattr(summary, "RESULTS", folder)

    def write(results: list[dict[str, Any]]) -> Any:
        return json.loads(summary.write("task", results, METHODS).read_text())["methods"]

    return write


def test_rows_of_methods_without_runs_stay(written):
    written(runs("exact", 57.0, seeds=3) + runs("small", 55.0, seeds=3))
    found = written(runs("small", 54.0, seeds=3))
    assert found["exact"]["best"]["test"] == {"0": 57.0, "1": 57.0, "2": 57.0}
    assert found["small"]["best"]["test"] == {"0": 54.0, "1": 54.0, "2": 54.0}


@pytest.mark.parametrize(("seeds", "kept"), [(1, True), (2, True), (3, False)])
def test_a_row_gives_way_only_to_as_many_seeds(written, seeds, kept):
    written(runs("exact", 57.0, seeds=3))
    assert written(runs("exact", 56.0, seeds=seeds))["exact"]["best"]["test"]["0"] == (57.0 if kept else 56.0)


def test_a_run_that_diverged_is_not_hidden_by_earlier_ones(written):
    written(runs("exact", 57.0, seeds=3))
    assert written(runs("exact", None, seeds=1))["exact"]["best"]["test"] is None
