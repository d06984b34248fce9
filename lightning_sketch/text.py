"""Numbers, codecs and tables as text for people."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Bytes in binary units.

    >>> human_bytes(512), human_bytes(3 * 2**20)
    ('512 B', '3.00 MiB')
    """
    unit = 0
    while abs(count) >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.2f} {_UNITS[unit]}"


def short(codec: object) -> str:
    """A codec with the options that differ from its defaults.

    >>> from lightning_sketch import CountSketch
    >>> short(CountSketch(compression=5)), short(CountSketch())
    ('CountSketch(compression=5)', 'CountSketch()')
    """
    given = [
        f"{f.name}={getattr(codec, f.name)!r}"
        for f in dataclasses.fields(codec)  # type: ignore[arg-type]
        if getattr(codec, f.name) != f.default
    ]
    return f"{type(codec).__name__}({', '.join(given)})"


def without_numbers(name: str) -> str:
    """A layer's name with a star for every number in it: the same for the layers of repeated blocks.

    >>> without_numbers("model.layers.11.mlp.weight")
    'model.layers.*.mlp.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def state_rows(by_codec: Mapping[str, int], dense: int, than: str) -> Iterator[tuple[str, str, str]]:
    """Rows of a `table` of bytes: all states together, and those of each codec.

    Args:
        dense: bytes of the same states as torch keeps them.
        than: what these are called.
    """
    total = sum(by_codec.values())
    yield "optimizer state", human_bytes(total), f"{dense / total:.1f}x less than {than}" if total else "none yet"
    for codec, count in sorted(by_codec.items()):
        yield f"  {codec}", human_bytes(count), ""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str] | None]) -> str:
    """A table as plain text, wide enough for its contents.

    Args:
        columns: their names; those that begin with ">" are aligned to the right.
        rows: a cell for each of the first columns; ``None`` for a line between sections.
    """
    from rich.console import Console  # slow to import
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        if row is None:
            made.add_section()
        else:
            made.add_row(*row)
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(made)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
