"""Lightning's Trainer, which saves through ModelCheckpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader

from lightning_sketch.integrations.lightning import OptimizerStateCompression
from tests.integrations.lightning_tools import POLICY, adamw, batches, tiny, trainer
from tests.integrations.test_lightning_fsdp2 import POLICY as SHARDED_POLICY
from tests.integrations.test_lightning_fsdp2 import Words
from tests.killed.tools import MOST_SAVES, Engine, Held, Refused, held, restored


class Calls(Callback):
    """Calls a function with the module when training starts, and after every step."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self.function = function

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.function(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.function(pl_module)


class Lightning(Engine):
    """A single process."""

    world = 1

    def fit(self, steps: int, *callbacks: Callback, ckpt_path: Path | None = None, saves: bool = False) -> None:
        compression = OptimizerStateCompression(POLICY, log_memory=False)
        options = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": saves}
        made = trainer(callbacks=[compression, *callbacks], **options)
        made.fit(tiny(adamw), batches(7, identical=True), ckpt_path=ckpt_path)

    def run(self, folder: Path) -> None:
        every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        self.fit(MOST_SAVES, every_step, saves=True)

    def undisturbed(self, steps: int) -> list[Held]:
        found: list[Held] = []
        self.fit(steps, Calls(lambda module: found.append(_held(module))))
        return found

    def resume(self, path: Path, step: int) -> tuple[Held, Held] | Refused:
        found: list[Held] = []
        try:
            self.fit(step + 1, Calls(lambda module: found.append(_held(module))), ckpt_path=path)
        except (Exception, CheckpointException) as error:  # the second is a BaseException
            assert not found, "it has trained"
            return Refused(f"{type(error).__name__}: {error}")
        loaded, after = found
        return loaded, after

    def restore(self, paths: list[Path]) -> list[tuple[str, Held]]:
        found: list[list[tuple[str, Held]]] = []

        def restore_all(module: Any) -> None:
            found.append([restored(module.optimizers(), lambda: _held(module), path) for path in paths])

        self.fit(1, Calls(restore_all))
        return found[1]  # after a step


class LightningFSDP2(Lightning):
    """``ModelParallelStrategy(save_distributed_checkpoint=True)``."""

    world = 2
    needed = (".metadata", "*.distcp")

    def fit(self, steps: int, *callbacks: Callback, ckpt_path: Path | None = None, saves: bool = False) -> None:
        # The variables that torchrun sets: Lightning then starts no processes of its own. It deletes some of them.
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
        compression = OptimizerStateCompression(SHARDED_POLICY, log_memory=False)
        options = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": saves}
        strategy = ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=True
        )
        made = trainer(devices=world, strategy=strategy, callbacks=[compression, *callbacks], **options)
        made.fit(Words("rows", seed=0), DataLoader(range(4), batch_size=None), ckpt_path=ckpt_path)


def _held(module: Any) -> Held:
    return held(module, module.optimizers().optimizer)
