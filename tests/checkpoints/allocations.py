"""Measure what is allocated on the CPU while something runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def allocated(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What a call returns, and the bytes of everything that torch's allocator gave this thread meanwhile.

    Other than `Allocations` it sees what operators make inside themselves, custom ones among them, and mapped files.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return result, [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


class Allocations(TorchDispatchMode):
    """Collects the size of every storage above a limit that an operator makes; views and memory-mapped files are none.

    On Linux, which says what of memory is a mapped file.

    `sizes` are in bytes, ascending. `peak_python` is the most that Python objects, such as buffers to read into, held
    at once.

    A process with gloo's threads has to call ``tracemalloc.start()`` before they have anything to do, and never stops
    it. A thread that lets go of a tensor takes the GIL, for which it allocates a thread state; where it waits meanwhile
    and ``tracemalloc.stop()`` runs, it then writes through a null pointer: a segmentation fault in Python before
    3.12.9 and 3.13.2, python/cpython issue 128679.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.sizes: list[int] = []
        self.peak_python = 0

    def __enter__(self) -> Allocations:
        self._stop = not tracemalloc.is_tracing()
        if self._stop:
            assert not dist.is_initialized(), "gloo's threads would crash in tracemalloc.stop()"
            tracemalloc.start()
        tracemalloc.clear_traces()  # begins anew with 0
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.peak_python = tracemalloc.get_traced_memory()[1]
        if self._stop:
            tracemalloc.stop()
        self.sizes.sort()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage.data_ptr() for storage in _storages([*args, *(kwargs or {}).values()])}
        result = func(*args, **(kwargs or {}))
        for storage in _storages([result]):
            if storage.nbytes() > self.limit and storage.data_ptr() not in known and not _is_mapped(storage):
                self.sizes.append(storage.nbytes())
        return result


def _is_mapped(storage: torch.UntypedStorage) -> bool:
    """Whether a storage is a memory-mapped file, of which the system reads the pages that are touched."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, *_, name = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in extent.split("-"))
        if start <= storage.data_ptr() < stop:
            return name.startswith("/")
    return False


def _storages(values: Sequence[Any]) -> Iterator[torch.UntypedStorage]:
    """Memory of the tensors that have some of their own here; not DTensors and the like, which hold another tensor."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _storages(value)
        elif type(value) in (Tensor, torch.nn.Parameter) and value.device.type == "cpu":
            yield value.untyped_storage()
