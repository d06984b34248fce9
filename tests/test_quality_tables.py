"""docs/quality.md has the measured tables, and the frontier is what nothing beats with as few bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import frontier, make_tables, monitor_figures, usual_recipe_tables
from benchmarks.frontier import Point, is_on_the_frontier, measured
from benchmarks.make_tables import PAGE
from benchmarks.pages import stale_tables


@pytest.mark.parametrize("source", [frontier, make_tables, usual_recipe_tables], ids=lambda source: source.__name__)
def test_the_page_has_the_measured_tables(source):
    assert stale_tables(PAGE, source.tables()) == []


@pytest.mark.parametrize(("name", "most"), [("rw_10", 1.01), ("floored", 1.03)])  # a sketch of rows, and the default
def test_sparse_tables_train_in_what_plain_sgd_takes(name, most):
    found, least = measured("sparse_lm")
    (point,) = [point for point in found if point.name == name]
    assert point.peak < most * least


def test_the_page_of_the_monitor_has_its_figures():
    stored = json.loads(monitor_figures.PATH.read_text())
    assert stale_tables(monitor_figures.PAGE, {"monitor_figures": monitor_figures.table(stored)}) == []
    assert stored.keys() == monitor_figures.POLICIES.keys()


def test_the_frontier_is_what_nothing_beats_with_as_few_bytes():
    def point(name: str, peak: float, quality: float) -> Point:
        best: dict[str, Any] = {"test": {"0": quality}, "lr": 1.0, "eps": 1e-8, "valid": quality}
        return Point(name, name, 1.0, peak, best)

    points = [
        point("small", 5.0, 57.0),
        point("alike", 5.02, 56.0),
        point("worse", 9.0, 56.5),
        point("best", 15.0, 54.0),
    ]
    assert [point.name for point in points if is_on_the_frontier(point, points)] == ["alike", "best"]
