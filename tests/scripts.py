"""Run a script as its command does, in processes that have imported everything already."""

from __future__ import annotations

import faulthandler
import gc
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub.constants
import torch
import torch.distributed as dist

from tests.gloo import one_thread
from tests.ranks import start_ranks


def run_script(path: Path, *options: str, world_size: int = 0) -> str:
    """What ``python path options`` prints, in the working directory of the caller.

    The script runs under the name ``__main__``, in a process that is forked from the server of `tests.ranks`: seconds
    less than a new interpreter needs for its imports.

    Args:
        world_size: run it on so many processes, with what ``torchrun --standalone`` sets in their environment; 0 for
            one process without.

    Raises:
        ProcessRaisedException, ProcessExitedException: a process raised or died.
    """
    # As torchrun does, whose store the ranks meet in.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world_size else None
    port = store.port if store else 0
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(_entry, (world_size, port, folder, str(path), options), world_size or 1)
        while not context.join():
            pass
        return "".join(Path(folder, f"{rank}.out").read_text() for rank in range(world_size or 1))


def _entry(rank: int, world_size: int, port: int, folder: str, path: str, options: tuple[str, ...]) -> None:
    faulthandler.enable()
    gc.freeze()
    torch.set_num_threads(1)
    one_thread()
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # nothing is downloaded
    os.dup2(os.open(f"{folder}/{rank}.out", os.O_WRONLY | os.O_CREAT), 1)
    if world_size:
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "NODE_RANK": 0}
        sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        run = {"TORCHELASTIC_RUN_ID": "script", "OMP_NUM_THREADS": 1}
        os.environ.update({key: str(value) for key, value in (place | sizes | meeting | run).items()})
    sys.argv = [path, *options]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()
    Path(folder, f"{rank}.done").touch()
    while not all(Path(folder, f"{other}.done").exists() for other in range(world_size)):
        time.sleep(0.01)  # the others may still need this rank's connections
    os._exit(0)  # without destructors, see `tests.ranks`
