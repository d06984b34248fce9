"""Gloo process groups that do not corrupt memory."""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroupGloo, Store


def one_thread() -> None:
    """Give every gloo process group that this process makes from now on one worker thread instead of two.

    The worker threads of torch 2.13 write the name of the operation that they completed into one ``std::string``
    without a lock (``lastCompletedWorkName`` in ``ProcessGroupGloo::runLoop``). Names of more than 15 characters,
    ``_ALLREDUCE_SPARSE`` and ``_REDUCE_SCATTER_BASE`` among them, live on the heap, so that two threads now and then
    free or overwrite each other's: "malloc(): unaligned tcache chunk detected", minutes into a training with DDP and
    sparse gradients, with FSDP2 or with ZeRO. ``init_process_group`` ignores ``pg_options`` for gloo.
    """
    made = ProcessGroupGloo.__init__
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def init(self: Any, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads = [ProcessGroupGloo.create_default_device()], 1
        options._timeout = timeout
        made(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = init


def launched() -> dict[str, str]:
    """Environment for a command that starts ranks: `one_thread` in all of them, and one thread to compute with."""
    start = str(Path(__file__).with_name("start"))  # has a sitecustomize.py, which Python runs first
    path = os.pathsep.join(filter(None, [start, os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
