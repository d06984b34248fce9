"""docs/papers.md has the measured tables, and none that were not measured."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.pages import stale_tables
from benchmarks.papers_tables import PAGE, tables
from benchmarks.summary import RESULTS

SOURCES = ("lstm_lm", "resnet", "tied_transformer", "long_run")


def stored() -> dict[str, Any]:
    paths = {name: RESULTS / f"{name}.json" for name in SOURCES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def test_the_page_has_the_measured_tables():
    assert stale_tables(PAGE, tables(stored())) == []


def test_tables_that_were_not_measured_say_so():
    found = re.findall(r"<!-- begin:(\w+) -->\n(.*?)<!-- end:\1 -->", PAGE.read_text(), re.DOTALL)
    assert {name for name, table in found if table.strip() != "Not run yet."} == set(tables(stored()))


def test_absent_results_make_no_tables():
    assert tables({}) == {}


def row(label: str, lr: float, *test: float) -> dict[str, Any]:
    best = {"lr": lr, "eps": 1e-8, "valid": test[0], "test": {str(seed): value for seed, value in enumerate(test)}}
    return {"label": label, "state_bytes": 100, "best": best}


def test_a_paper_s_figure_stands_beside_ours():
    rows = {"full_adam": row("", 0.008, 50.0, 50.0), "full_adam_paper16_v": row("", 0.004, 51.0, 52.0)}
    lines = tables({"lstm_lm": {"methods": rows}})["lstm_full_adam"].splitlines()
    assert "| 105.14 |  | 50.00 " in lines[2]
    assert "| 106.32 | +1.1 % | 51.50 (51.00-52.00, 2 seeds) | +3.0 % (+2.0 to +4.0) |" in lines[3]


def test_accuracies_are_compared_in_points():
    rows = {"adam": row("", 1e-3, 10.0, 10.2), "adam_8bit": row("", 1e-3, 10.3, 10.7)}
    line = tables({"resnet": {"methods": rows}})["resnet"].splitlines()[-1]
    assert "| 89.50 (89.30-89.70) | -0.40 (-0.50 to -0.30) | **no** |" in line
