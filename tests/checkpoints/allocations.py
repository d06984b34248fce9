"""Measure what is allocated on the CPU while something runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def allocated(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What a call returns, and the bytes of everything that torch's allocator gave this thread meanwhile.

    Other than `Allocations` it sees what operators make inside themselves, custom ones among them, and mapped files.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return result, [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


class Allocations(TorchDispatchMode):
    """Collects the size of every storage that an operator makes; views and memory-mapped files are none.

    On Linux, which says what of memory is a mapped file.

    `peak_python` is the most that Python objects, such as buffers to read into, held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.peak_python = 0

    def __enter__(self) -> Allocations:
        tracemalloc.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.peak_python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage().data_ptr() for tensor in _plain(args, kwargs)}
        result = func(*args, **(kwargs or {}))
        for tensor in _plain(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and not _is_mapped(storage):
                self.sizes.append(storage.nbytes())
        return result

    def larger_than(self, limit: int) -> list[int]:
        """Sizes above a limit, in bytes, ascending."""
        return sorted(size for size in self.sizes if size > limit)


def _is_mapped(storage: torch.UntypedStorage) -> bool:
    """Whether a storage is a memory-mapped file, of which the system reads the pages that are touched."""
    if storage.nbytes() < 1 << 16:
        return False  # saves the time
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, *_, name = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in extent.split("-"))
        if start <= storage.data_ptr() < stop:
            return name.startswith("/")
    return False


def _plain(*values: Any) -> list[Tensor]:
    """The tensors that have memory of their own here; not DTensors and the like, which hold another tensor."""
    found = [value for value in tree_leaves(values) if type(value) in (Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if tensor.device.type == "cpu"]
