"""Tables in the pages of the documents, between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->``.

Scripts write them, people the rest of a page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between the marks of its name.

    Raises:
        ValueError: the page lacks marks; it is left as it was.
    """
    page.write_text(_with_tables(page, tables))


def stale_tables(page: Path, tables: Mapping[str, str]) -> list[str]:
    """Names of tables that the page has otherwise.

    Raises:
        ValueError: the page lacks marks.
    """
    text = page.read_text()
    return [name for name, table in tables.items() if _with_tables(page, {name: table}) != text]


def _with_tables(page: Path, tables: Mapping[str, str]) -> str:
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- begin:{name} -->\n", f"<!-- end:{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page.name} has no {begin.strip()} ... {end}")
        replacement = f"{begin}\n{table}\n\n{end}"
        text = pattern.sub(lambda _, new=replacement: new, text)  # type: ignore[misc]
    return text
