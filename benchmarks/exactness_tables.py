"""The tables of docs/sharding.md that say how exact every engine is, and how much lies on each rank.

Made of ``results/exactness.json``, which :mod:`benchmarks.exactness` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import pages
from benchmarks.exactness_demo import ENGINES as DEMO_ENGINES
from benchmarks.exactness_prescribed import ENGINES, LABELS
from benchmarks.pages import DOCS

PAGE = DOCS / "sharding.md"


def write_tables(found: dict[str, Any]) -> None:
    """Put the tables into the page."""
    pages.write_tables(PAGE, tables(found))


def tables(found: dict[str, Any]) -> dict[str, str]:
    """All tables, by the name of their marks."""
    return {"exactness": exactness(found), "demo": demo(found), "memory": memory(found)}


def exactness(found: dict[str, Any]) -> str:
    """Codecs by engines, with prescribed gradients."""
    seeds = {codecs: " / ".join(map(percent, apart)) for codecs, apart in found["prescribed_seeds"].items()}
    rows = _rows(ENGINES, found["prescribed"], lambda cell: cell["word"] or percent(cell["distance"]))
    return _table([*ENGINES.values(), "other hash seeds"], {name: [*row, seeds.get(name, "")] for name, row in rows})


def demo(found: dict[str, Any]) -> str:
    """Codecs by engines, with the demo's model; where a cell is neither equal nor rounding, with its loss."""

    def show(cell: dict[str, Any]) -> str:
        return str(cell["word"] or f"{percent(cell['distance'])} ({cell['loss']:+.2f})")

    rows = _rows(DEMO_ENGINES, found["demo"], show)
    more = {
        name: [
            f"{found['demo_loss'][name]:.3f}",
            f"{found['demo_spread'][name]:.0e}",
            " / ".join(map(show, found["demo_seeds"].get(name, ()))),
        ]
        for name in LABELS
    }
    columns = [*DEMO_ENGINES.values(), "one process: loss", "the batch in parts", "other hash seeds"]
    return _table(columns, {name: [*row, *more[name]] for name, row in rows})


def memory(found: dict[str, Any]) -> str:
    """The fullest rank's bytes as a share of one process's."""
    shares = {
        codecs: {
            kind: {n: max(ranks) / found["bytes_alone"][codecs] for n, ranks in by.items() if n != "1"}
            for kind, by in engines.items()
        }
        for codecs, engines in found["bytes"].items()
    }
    rows = _rows(ENGINES, shares, lambda share: f"{share:.3f}")
    alone = {name: f"{size:,} B" for name, size in found["bytes_alone"].items()}
    columns = ["one process", *(f"{engine}: 2 / 3 / 4 ranks" for engine in ENGINES.values())]
    return _table(columns, {name: [alone[name], *row] for name, row in rows})


def percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def _rows(engines: Iterable[str], found: dict[str, Any], show: Callable[[Any], str]) -> Iterable[tuple[str, list[str]]]:
    """For codecs a cell for each engine, with what there is for each number of ranks."""
    for codecs in LABELS:
        if codecs in found:
            yield codecs, [" / ".join(map(show, found[codecs][kind].values())) for kind in engines]


def _table(columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| codecs | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {LABELS[name]} | {' | '.join(cells)} |" for name, cells in rows.items())])
