"""Accelerate's FSDP2: load a directory of ``save_state`` that is plain, or of another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sketch.classes import unwrap
from lightning_sketch.optimizer import CompressedOptimizer
from lightning_sketch.sharding.agree import any_of_all


def load_state(accelerator: Any, directory: str | Path, **kwargs: Any) -> None:
    """``accelerator.load_state(directory)``, and under FSDP2 also of states that have to be moved.

    Accelerate reads into tensors of the live optimizer's names and shapes. A checkpoint that was written before the
    optimizer was converted, or on another number of processes, has others. Then Accelerate is shown no optimizer and
    loads all the rest, and `lightning_sketch.portable.restore` loads the states. Every process calls it.

    Args:
        accelerator: an ``accelerate.Accelerator``, after ``prepare``.
        directory: what ``accelerator.save_state`` wrote, sharded or full.
        kwargs: for ``accelerator.load_state``.

    Raises:
        ValueError: the checkpoint was written under another policy. Nothing was changed then.
    """
    optimizers = accelerator._optimizers
    files = [_saved_optimizer(Path(directory), number) for number in range(len(optimizers))]
    if not accelerator.is_fsdp2 or not any_of_all(lambda: _must_move(optimizers, files)):
        accelerator.load_state(str(directory), **kwargs)
        return
    from lightning_sketch.portable import restore

    accelerator._optimizers = []
    try:
        accelerator.load_state(str(directory), **kwargs)
    finally:
        accelerator._optimizers = optimizers
    for optimizer, path in zip(optimizers, files, strict=True):
        restore(optimizer, path)


def _saved_optimizer(directory: Path, number: int) -> Path:
    """Where ``save_state`` puts an optimizer: a directory if sharded, else a file."""
    sharded = directory / f"optimizer_{number}"
    return sharded if sharded.is_dir() else directory / (f"optimizer_{number}.bin" if number else "optimizer.bin")


def _must_move(optimizers: list[Any], files: list[Path]) -> bool:
    """Whether some optimizer's states must be moved, and all can be."""
    inner = [unwrap(optimizer) for optimizer in optimizers]
    converted = [optimizer for optimizer in inner if isinstance(optimizer, CompressedOptimizer)]
    if len(converted) < len(inner) or not all(path.exists() for path in files):
        return False  # nothing we can load: let Accelerate do it, or say what is wrong
    from lightning_sketch.portable import read_checkpoint
    from lightning_sketch.portable.fit import must_move

    saved = [read_checkpoint(path, o._compression.names) for o, path in zip(converted, files, strict=True)]
    moves = [must_move(optimizer, found) for optimizer, found in zip(converted, saved, strict=True)]
    return any(moves)
