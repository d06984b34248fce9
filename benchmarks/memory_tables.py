"""The tables of docs/memory.md, from ``results/*.json``.

python -m benchmarks.memory_tables
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks import billion_word, largest_batch
from benchmarks.pages import DOCS, write_tables
from benchmarks.summary import RESULTS

PAGE = DOCS / "memory.md"
#: By the name of the JSON file and of the marks in the page.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "billion_word": billion_word.table,
    "extreme_memory": largest_batch.table,
    "transformer_memory": largest_batch.table,
}


def tables() -> dict[str, str]:
    """Those that were measured, by name."""
    sources = {name: RESULTS / f"{name}.json" for name in TABLES}
    return {name: TABLES[name](json.loads(path.read_text())) for name, path in sources.items() if path.exists()}


def main() -> None:
    write_tables(PAGE, tables())


if __name__ == "__main__":
    main()
