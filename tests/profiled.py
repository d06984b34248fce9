"""Bytes that torch's CPU allocator gives out within a call."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def live_bytes(call: Callable[[], Any]) -> list[int]:
    """How many were allocated within a call and not yet freed, after each allocation and each release, in order."""
    gc.collect()
    gc.disable()  # what other tests left behind would be freed within the call, and count against it
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    finally:
        gc.enable()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return list(itertools.accumulate(change for _, change in changes))


def peak_bytes(call: Callable[[], Any]) -> int:
    """The largest of `live_bytes`."""
    return max(live_bytes(call), default=0)
