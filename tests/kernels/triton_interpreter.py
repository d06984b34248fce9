"""Triton's interpreter, quicker: a plugin of pytest for the processes that test_triton.py starts.

Triton exchanges its language for the interpreter's when a kernel is launched, and again at every call of a function by
a kernel, which takes a third of the time. Here it does so once a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Scope:
    """What a launch puts back at its end."""

    def __init__(self, scope: Any, exchanged: set[tuple[bool, ...]]) -> None:
        self._scope, self._exchanged = scope, exchanged

    def restore(self) -> None:
        self._exchanged.clear()
        self._scope.restore()


def _once_a_launch(exchange: Callable[[Any], Any]) -> Callable[[Any], Any]:
    exchanged: set[tuple[bool, ...]] = set()  # for which of the modules, in the launch that runs

    def patch(fn: Any) -> Any:
        names = fn.__globals__.values()
        seen = tuple(any(value is module for value in names) for module in (tl, tl.core))
        if seen in exchanged:
            return None
        exchanged.add(seen)
        return _Scope(exchange(fn), exchanged)

    return patch


interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
