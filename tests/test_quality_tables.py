"""docs/quality.md has the measured tables, and the frontier is what nothing beats with as few bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import monitor_figures, second_moments
from benchmarks.frontier import TASKS, Point, is_on_the_frontier, measured, table
from benchmarks.make_tables import PAGE, tables
from benchmarks.summary import RESULTS
from benchmarks.usual_recipe_tables import usual_recipe_tables


def is_in_the_page(name: str, made: str, page: Path = PAGE) -> bool:
    return f"<!-- begin:{name} -->\n\n{made}\n\n<!-- end:{name} -->" in page.read_text()


@pytest.mark.parametrize("name", TASKS)
def test_the_page_has_the_measured_frontier(name):
    found, least = measured(name)
    assert is_in_the_page(f"frontier_{name}", table(found, TASKS[name], least))


@pytest.mark.parametrize(("name", "most"), [("rw_10", 1.01), ("floored", 1.03)])  # a sketch of rows, and the default
def test_sparse_tables_train_in_what_plain_sgd_takes(name, most):
    found, least = measured("sparse_lm")
    (point,) = [point for point in found if point.name == name]
    assert point.peak < most * least


def test_the_page_has_what_the_usual_recipe_came_to():
    stored = json.loads((RESULTS / "usual_recipe.json").read_text())
    for name, made in usual_recipe_tables(stored["runs"]).items():
        assert is_in_the_page(name, made), name


def test_the_page_has_how_alike_second_moments_are():
    stored = json.loads((RESULTS / "second_moments.json").read_text())
    assert is_in_the_page("second_moments", second_moments.table(stored))


def test_the_page_has_all_other_tables():
    for name, made in tables().items():
        assert is_in_the_page(name, made), name


def test_the_page_of_the_monitor_has_its_figures():
    stored = json.loads(monitor_figures.PATH.read_text())
    assert is_in_the_page("monitor_figures", monitor_figures.table(stored), monitor_figures.PAGE)
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
