"""What a process takes at its peak, a limit that the system enforces, and the largest size that stays below it.

A script runs each training in a child of its own: a new Python process, so that nothing of one optimizer is left when
the next begins. The child calls :func:`answer`, the parent :func:`run_capped` and :func:`largest`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

#: glibc's malloc without lists of freed memory: blocks of 64 KiB and more are the system's own, and go back to it when
#: they are freed. So a peak is what was alive, not what was alive at different times in different sizes.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**17)}

ROOT = Path(__file__).parent.parent
MIB = 2**20
OUT_OF_MEMORY = 77  # a child's exit status
CGROUPS = Path("/sys/fs/cgroup")
#: What an allocation that was refused is called by PyTorch, oneDNN and C++.
_REFUSED = ("can't allocate memory", "could not create a memory", "Cannot allocate memory", "bad_alloc")

Answer = dict[str, Any]


def status(key: str) -> int:
    """Bytes, from ``/proc/self/status``: ``VmRSS`` for what this process has, ``VmHWM`` for the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def begin_phase() -> int:
    """Give free memory back to the system and forget the peak so far; bytes that this process has."""
    with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def needs_of(work: Callable[[], object]) -> int:
    """Bytes of its own that this process has at the most while it does `work`; libraries' data count, code does not."""
    before = begin_phase()
    own, code = status("VmData"), status("RssFile")
    work()
    return own + status("VmHWM") - before - (status("RssFile") - code)


def answer(work: Callable[[], Answer]) -> None:
    """In the child: print what `work` returns; exit with `OUT_OF_MEMORY` where memory was refused."""
    try:
        found = work()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _REFUSED):
            raise
        os._exit(OUT_OF_MEMORY)  # at once: nothing more can be allocated
    print(json.dumps(found))


def run_capped(module: str, arguments: Sequence[str], *, cap: int | None = None, threads: int = 1) -> Answer | None:
    """Run ``python -m module arguments`` in a process that may have `cap` bytes of memory of its own.

    The limit is a control group's ``memory.max`` where one may be made (cgroup v2), and ``RLIMIT_DATA`` elsewhere.
    Imports count, shared libraries' code does not.

    Args:
        cap: bytes; ``None``: no limit.
        threads: of the child.

    Returns:
        what the child answered; ``None``: it asked for more memory than `cap`.

    Raises:
        RuntimeError: the child failed in any other way; also where `cap` is too small for its imports.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with _limit(cap) as (prefix, was_killed):
        child = subprocess.run(
            [*prefix, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        killed = child.returncode == -signal.SIGKILL and was_killed()
    if child.returncode == 0:
        found: Answer = json.loads(child.stdout.splitlines()[-1])
        return found
    aborted = child.returncode == -signal.SIGABRT and "bad_alloc" in child.stderr
    if cap is not None and (child.returncode == OUT_OF_MEMORY or aborted or killed):
        return None
    raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{child.stderr[-2_000:]}")


def largest(fits: Callable[[int], bool], *, start: int, precision: float = 0.02) -> int:
    """The largest size that fits, to within `precision` of it; 0 if not even 1 does.

    Args:
        fits: whether a size does; if one does, so do all that are smaller.
        start: the first size that is tried. From there strides double until one fits and another does not.
    """
    below, above = 0, 0  # fits; does not, once it is found
    size, stride = start, max(1, int(precision * start))
    while not (below and above) and above != 1:
        if fits(size):
            below, size = size, size + stride
        else:
            above, size = size, max(1, size - stride)
        stride *= 2
    while above - below > max(1, int(precision * below)):
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def enforced_by() -> str:
    """What enforces a limit here."""
    return "cgroup v2, memory.max" if _may_make_groups() else "RLIMIT_DATA"


@contextlib.contextmanager
def _limit(cap: int | None) -> Iterator[tuple[list[str], Callable[[], bool]]]:
    """A command's prefix that limits its memory, and whether the system killed a process for it."""
    if cap is None:
        yield [], lambda: False
    elif _may_make_groups():
        group = CGROUPS / f"lightning_sketch_{os.getpid()}"
        group.mkdir()
        try:
            (group / "memory.max").write_text(str(cap))
            with contextlib.suppress(OSError):  # no swap, or no file for it
                (group / "memory.swap.max").write_text("0")
            enter = 'echo $$ > "$0" && exec "$@"'
            yield ["sh", "-c", enter, str(group / "cgroup.procs")], lambda: _kills(group) > 0
        finally:
            group.rmdir()
    else:
        yield ["sh", "-c", 'ulimit -d "$0" && exec "$@"', str(cap // 1024)], lambda: False


def _may_make_groups() -> bool:
    controls = CGROUPS / "cgroup.subtree_control"
    return os.access(CGROUPS, os.W_OK) and controls.exists() and "memory" in controls.read_text().split()


def _kills(group: Path) -> int:
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    return int(events["oom_kill"])
