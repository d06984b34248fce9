"""Ranks that may hang or be killed."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import ranks

#: Seconds after which ranks are taken to hang.
HANG = 300


def start(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Start ``function(rank, world_size, *args)`` on ranks joined by gloo; on one rank without a process group.

    See `tests.ranks.start_ranks` for the environment that ranks see.

    Args:
        folder: made; results come into it.
        function: a module-level function; what it returns must be loadable with ``weights_only=True``.

    Returns:
        torch's ``ProcessContext``.
    """
    folder.mkdir()
    return ranks.start_ranks(_entry, (world_size, str(folder), function, args), world_size)


def finish(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function` returns on every rank; see `start`.

    Raises:
        ProcessRaisedException, ProcessExitedException: a rank raised or died; the others were ended.
    """
    context = start(world_size, folder, function, *args)
    deadline = time.monotonic() + HANG
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        kill(context)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def kill(context: Any) -> None:
    """Kill all ranks at once, those that still run."""
    for process in context.processes:
        process.kill()
    for process in context.processes:
        process.join()


def _entry(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if world_size > 1:
        ranks._entry(rank, world_size, folder, function, args)  # ends the process
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.save(function(rank, world_size, *args), Path(folder, f"{rank}.pt"))
