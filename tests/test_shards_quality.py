"""docs/sharding.md has the measured perplexities of row shards, and they meet the mark."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.pages import stale_tables
from benchmarks.shards_quality import DEFAULTS, PAGE, ROWS, method_of, quality_table
from benchmarks.summary import RESULTS


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "shards_quality.json").read_text())["runs"]
    return found


def perplexities(runs: list[dict[str, Any]], method: str) -> list[float]:
    return [run["test"] for run in runs if run["setting"]["method"] == method]


def test_the_document_has_the_measured_table(runs):
    assert stale_tables(PAGE, {"shards_quality": quality_table(runs)}) == []


def test_every_number_of_shards_was_measured(runs):
    for (codecs, agree), numbers in ROWS.items():
        for shards in numbers:
            assert perplexities(runs, method_of(codecs, shards, agree)), (codecs, agree, shards)


def test_the_default_is_one_process_at_every_number_of_shards(runs):
    for codecs in DEFAULTS:
        alone = {
            run["setting"]["seed"]: run["test"]
            for run in runs
            if run["setting"]["method"] == method_of(codecs, 1, True)
        }
        assert len(alone) >= 3
        for shards in ROWS[codecs, True][1:]:
            (found,) = perplexities(runs, method_of(codecs, shards, True))
            assert found == pytest.approx(alone[0], rel=1e-3), (codecs, shards)
            # what seeds differ by is more
            assert max(alone.values()) - min(alone.values()) > 10 * abs(found - alone[0])
