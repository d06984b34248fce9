"""Gloo process groups that do not corrupt memory."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import warnings
from collections.abc import Sequence
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
    """Environment for a command that starts ranks, one computing thread each, which do what `tests/start` says."""
    start = str(Path(__file__).with_name("start"))  # has a sitecustomize.py, which Python runs first
    path = os.pathsep.join(filter(None, [start, os.environ.get("PYTHONPATH")]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    return os.environ | settings | {"PYTHONWARNINGS": "ignore::FutureWarning"}  # torch's, hundreds of lines a run


def launch(command: Sequence[str | Path], folder: Path | None = None) -> str:
    """Run a command that starts ranks, in `folder`; what it printed. Fails where the command does.

    A rank that crashes outside our kernels is reported as a warning, with the ranks' stacks, and the command is run
    once more: gloo has crashed once in some hundred runs after `one_thread` too. (What is known: at the end of a
    process one of gloo's threads may still hold a tensor and want the GIL of an interpreter that is being finalised,
    pytorch/pytorch issue 190489.) A second crash is a failure.
    """
    crashed = re.compile(r"exitcode +: -(6|11) ")  # SIGABRT, SIGSEGV, in torchrun's summary
    ours = re.compile(r'Current thread [^\n]*\n  File "[^"\n]*lightning_sketch/kernels/')  # top of a stack
    for attempt in range(2):
        run = subprocess.run(command, cwd=folder, env=launched(), capture_output=True, text=True, check=False)
        if attempt or not crashed.search(run.stderr) or ours.search(run.stderr):
            break
        warnings.warn(f"a rank crashed, run once more:\n{run.stdout[-2000:]}\n{run.stderr}", stacklevel=2)
    assert run.returncode == 0, run.stderr
    return run.stdout
