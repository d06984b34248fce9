"""Large tables and their states in huge pages.

The rows that a sparse step touches lie anywhere in a table, so that nearly each one is on a page of its own, and to
look up where a page lies takes longer than to read a row. In pages of 2 MiB instead of 4 KiB most of that is saved.
Linux gives such pages to memory that asks for them (``madvise``), unless it is set to give them always or never.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

HUGE_PAGE = 1 << 21  # bytes
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of <sys/mman.h>: Python has the first on Linux only, and not the second


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.full``, in huge pages where it is large and the system has them."""
    if device.type != "cpu":
        return torch.full(shape, value, dtype=dtype, device=device)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    _advise(tensor, _MADV_HUGEPAGE)  # before anything is written: pages come when memory is first touched
    return tensor.fill_(value)


def move_there(tensor: Tensor) -> None:
    """Have the pages that a large tensor lies in replaced by huge ones, where the system does that (Linux 6.1).

    Its address and what is in it stay. It takes 0.3 to 2 seconds for a GiB, and next to nothing the second time. Pages
    that were never touched become resident with their neighbours. Memory that processes share is left alone.
    """
    _advise(tensor, _MADV_HUGEPAGE)  # for pages that were never touched, and for the system's own daemon
    _advise(tensor, _MADV_COLLAPSE)


def _advise(tensor: Tensor, advice: int) -> None:
    """Give advice of the huge pages that lie in a tensor as a whole. It is a hint: failing is no error."""
    advise = _madvise()
    if advise is None or type(tensor) not in (Tensor, Parameter) or tensor.nbytes < 2 * HUGE_PAGE:
        return
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_shared():  # type: ignore[no-untyped-call]
        return
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    last = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    advise(first, last - first, advice)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """``madvise(address, bytes, advice)``; ``None`` where there is none, or the system is set to give no huge pages."""
    try:
        if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            return None  # some kernels would collapse pages all the same
    except OSError:
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    found: Callable[[int, int, int], int] = function
    return found
