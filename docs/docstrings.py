"""Docstrings for the API pages: doctests become blocks of code, and ``:math:`` becomes a formula."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_DOCTEST = re.compile(r"(?m)^( *)>>> (?:.*\n?(?!\s*$))*.*$")


class Docstrings(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r":math:`(.*?)`", r"$\1$", obj.docstring.value, flags=re.S)
            obj.docstring.value = _DOCTEST.sub(_fenced, text)


def _fenced(match: re.Match[str]) -> str:
    block = f"```pycon\n{textwrap.dedent(match[0])}\n```"
    return textwrap.indent(block, match[1])
