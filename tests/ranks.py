"""Run a function on real gloo processes."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from tests.gloo import one_thread

#: What the server that forks ranks imports, once for all tests of a worker.
PRELOAD = (
    "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.testing",
    "lightning.pytorch", "accelerate", "transformers.integrations.deepspeed", "deepspeed", "lightning_sketch",
    "lightning_sketch.kernels.cpu", "pytest",
    # What every engine imports, with all of torch._inductor.
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer", "setuptools",
)  # fmt: skip


def start_ranks(entry: Callable[..., None], arguments: tuple[Any, ...], world_size: int) -> Any:
    """Start ``entry(rank, *arguments)`` on processes that are forked from a server which has imported everything.

    The server starts with the first call in a process, and keeps the environment of that moment: ranks see the
    variables that were set then, not those that a later test sets. Set them in the ranks.

    Returns:
        torch's ``ProcessContext``.
    """
    preload()
    return mp.start_processes(entry, arguments, nprocs=world_size, join=False, start_method="forkserver")


def preload() -> None:
    """Have Python's fork server, should it not run yet, import everything before it forks."""
    mp.get_context("forkserver").set_forkserver_preload(list(PRELOAD))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on `world_size` processes joined by gloo; see `start_ranks`.

    Args:
        function: a module-level function; what it returns must be loadable with ``weights_only=True``.

    Returns:
        what each rank returned, in rank order.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(_entry, (world_size, folder, function, args), world_size)
        while not context.join():
            pass
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world_size)]


def run_ranks_in(folder: Path, function: Callable[..., Any], world_size: int) -> list[Any]:
    """`run_ranks` with `folder` as the working directory: trainers write there, and module fixtures have no other."""
    with contextlib.chdir(folder):
        return run_ranks(function, world_size)


def _entry(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a rank that dies of a signal says where
    gc.freeze()  # spare every collection the search through all that was imported
    torch.set_num_threads(1)
    torch.manual_seed(0)
    one_thread()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    Path(folder, f"{rank}.done").touch()
    while not all(Path(folder, f"{other}.done").exists() for other in range(world_size)):
        time.sleep(0.01)  # the others may still be in the barrier, which needs this rank's connections
    # Without destructors: while they take engines and process groups apart, one of gloo's threads may crash, or wait
    # for the GIL that this thread holds.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
