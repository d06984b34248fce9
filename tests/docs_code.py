"""The blocks of Python in the documentation, and the names that fragments take for granted."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (*sorted(ROOT.joinpath("docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
_BLOCK = re.compile(r"(?m)^(?:<!-- (?P<mark>.+) -->\n)?^(?P<indent> *)```python\n(?P<code>(?:.*\n)*?)(?P=indent)```$")


@dataclass(frozen=True)
class Block:
    """A block of Python.

    Args:
        page: the file it is in.
        line: where it begins.
        code: what it says.
        mark: the comment before it: "shared" (later blocks of the page go on from it), "two processes",
            "from" and a file of which it is a part, or "not run: ..." with the reason.
    """

    page: Path
    line: int
    code: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def compiled(self) -> Any:
        """With the line numbers of the page."""
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec")


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield Block(page, line, textwrap.dedent(match["code"]), match["mark"] or "")


def run(block: Block, known: dict[str, Callable[[dict[str, Any]], Any]]) -> None:
    """Run a block after the shared ones of its page; what it takes for granted comes from `known`.

    Args:
        known: by name, what makes it, given what has been made.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    before = [other for other in blocks(block.page) if other.mark == "shared" and other.line < block.line]
    for each in (*before, block):
        for name in _taken_for_granted(each.code):
            if name in known and name not in names:
                names[name] = known[name](names)
        exec(each.compiled(), names)


def _taken_for_granted(code: str) -> list[str]:
    """Names that are read before they are assigned; an assignment reads its line before it assigns."""
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    names.sort(key=lambda name: (name.lineno, isinstance(name.ctx, ast.Store), name.col_offset))
    first = {name.id: name.ctx for name in reversed(names)}
    return [name for name, ctx in first.items() if isinstance(ctx, ast.Load)]
