"""docs/sharding.md has the measured tables of exactness, and every cell is one process's but for what it explains."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from benchmarks import exactness_demo
from benchmarks.exactness import EQUAL, WORLDS, Compared
from benchmarks.exactness_prescribed import ENGINES, LABELS
from benchmarks.exactness_tables import PAGE, tables
from benchmarks.pages import stale_tables
from benchmarks.summary import RESULTS
from tests.test_exactness import APART


@cache
def documented() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "exactness.json").read_text())
    return found


def test_the_document_has_the_measured_tables():
    assert stale_tables(PAGE, tables(documented())) == []


def test_every_cell_is_one_process_but_for_what_the_document_explains():
    found = documented()
    compared: dict[tuple[str, str, str], Compared] = {
        (codecs, kind, world): cell
        for table in ("prescribed", "demo")
        for codecs, engines in found[table].items()
        for kind, by_world in engines.items()
        for world, cell in by_world.items()
    }
    assert {key[0] for key in compared} == set(LABELS)
    assert {key[1] for key in compared} == ENGINES.keys() | exactness_demo.ENGINES.keys()
    assert {int(key[2]) for key in compared} == set(WORLDS)
    for (codecs, kind, world), cell in compared.items():
        # On one rank nothing may differ, but that DDP adds up duplicates in sparse gradients before we do.
        if world == "1" and kind != "ddp sparse":
            assert cell["word"] == EQUAL, (codecs, kind, cell)
        assert cell["word"] or (codecs, kind) in APART, (codecs, kind, world, cell)
