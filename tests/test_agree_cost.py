"""What docs/sharding.md says that agreeing costs is what the plan gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.agree_cost import on_paper

DOCUMENT = Path(__file__).parent.parent / "docs" / "sharding.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, ...]]:
    return {what: cells for what, *cells in on_paper()}  # type: ignore[misc]


def test_a_whole_model_costs_less_than_a_thousandth_of_what_fsdp2_sends(rows):
    for preset in ("tables", "whole-model"):
        collectives, _, _, share = rows[f"7B decoder, preset {preset!r}, by rows"]
        assert collectives == "1"
        assert float(share.rstrip("%")) < 0.1


def test_the_document_has_these_numbers(rows):
    document = DOCUMENT.read_text()
    for what in ("262,144 x 2,304, RowWise(compression=10), by rows", "262,144 x 2,304, Factored(), by rows",
                 "262,144 x 2,304, RowWise(), by columns", "262,144 x 2,304, CountSketch(sync=True), by rows",
                 "7B decoder, preset 'whole-model', by rows"):  # fmt: skip
        assert f"| {rows[what][1]} |" in document, what


def test_whole_rows_need_no_collective(rows):
    assert rows["262,144 x 2,304, RowWise(), by rows"][:2] == ["0", "0"]
