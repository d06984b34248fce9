"""Large states in huge pages.

The rows that a sparse step touches lie anywhere in a table, so that nearly each one is on a page of its own, and to
look up where a page lies takes longer than to read a row. In pages of 2 MiB instead of 4 KiB most of that is saved.
Linux gives such pages to memory that asks for them (``madvise``), unless it is set to give them always or never.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.full``, in huge pages where it is large and the system has them."""
    if device.type != "cpu":
        return torch.full(shape, value, dtype=dtype, device=device)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    _ask_for_huge_pages(tensor)  # before anything is written: pages come when memory is first touched
    return tensor.fill_(value)


def _ask_for_huge_pages(tensor: Tensor) -> None:
    advise = _madvise()
    if advise is None or type(tensor) is not Tensor or tensor.nbytes < 2 * HUGE_PAGE:
        return
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    last = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    advise(first, last - first, mmap.MADV_HUGEPAGE)  # a hint: it fails where the system was built without


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """``madvise(address, bytes, advice)``; ``None`` where there is none, or no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    found: Callable[[int, int, int], int] = function
    return found
