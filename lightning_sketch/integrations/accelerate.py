"""Accelerate's FSDP2: load a directory of ``save_state`` that is plain, or of another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sketch.integrations.resharding import accelerate_place, move, needs_resharding


def load_state(accelerator: Any, directory: str | Path, **kwargs: Any) -> None:
    """``accelerator.load_state(directory)``, and under FSDP2 also of states that have to be moved.

    Accelerate reads into tensors of the live optimizer's names and shapes. A checkpoint that was written before the
    optimizer was converted, or on another number of processes, has others. Then Accelerate is shown no optimizer and
    loads all the rest, and `lightning_sketch.checkpoints.restore` loads the states. Every process calls it.

    Args:
        accelerator: an ``accelerate.Accelerator``, after ``prepare``.
        directory: what ``accelerator.save_state`` wrote, sharded or full.
        kwargs: for ``accelerator.load_state``.

    Raises:
        ValueError: the checkpoint was written under another policy, or cannot be read. Nothing was changed then.
    """
    optimizers = accelerator._optimizers
    places = [accelerate_place(Path(directory), number) for number in range(len(optimizers))]
    if not accelerator.is_fsdp2 or not needs_resharding(optimizers, places):
        accelerator.load_state(str(directory), **kwargs)
        return
    accelerator._optimizers = []
    try:
        accelerator.load_state(str(directory), **kwargs)
    finally:
        accelerator._optimizers = optimizers
    move(optimizers, places)
