"""What memory allows: measured bandwidth, and the bytes that a step has to move at least."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Timed = Callable[[Callable[[], object]], float]  # runs what it is given, and returns the seconds
NUMEL = 1 << 26  # floats in each array: 256 MiB, far beyond any cache
REPEATS = 9


def wall_time(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def bandwidth(numel: int = NUMEL, timed: Timed = wall_time) -> dict[str, float]:
    """Bytes per second of a read, a copy, and an update in place (two reads and a write), by torch's own kernels on its
    default device: the best of a few, because a bound must not be what a disturbed machine reached.

    Counted is what the program asks for: where a copy makes the processor read the target before it is written, that
    traffic is not in the figure.
    """
    a, b = torch.zeros(numel), torch.ones(numel)
    size = a.nbytes
    patterns: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (size, lambda: a.sum()),
        "copy": (2 * size, lambda: a.copy_(b)),
        "update": (3 * size, lambda: a.add_(b, alpha=0.5)),
    }
    taken: dict[str, list[float]] = {name: [] for name in patterns}
    for _ in range(REPEATS):
        for name, (_, run) in patterns.items():
            taken[name].append(timed(run))
    return {name: moved / min(taken[name]) for name, (moved, _) in patterns.items()}


def dense_bytes(itemsize: int, *, state: float, passes: int = 1, check: bool = False) -> float:
    """Bytes per element of a dense step.

    Args:
        itemsize: of parameter and gradient.
        state: bytes per element of states, read and written counted apart.
        passes: how often the gradient is read: twice where sums over it are needed before the first update.
        check: whether it is read once more beforehand, for NaN and inf.
    """
    return itemsize * (2 + passes + check) + state


def sparse_bytes(columns: int, *, state: float, passes: int = 1, check: bool = False) -> float:
    """Bytes per touched row of a float32 step: as `dense_bytes`, and 8 bytes of row id for each pass.

    Args:
        state: bytes per row of states, whole cache lines.
    """
    return 4 * columns * (2 + passes + check) + 8 * passes + state
