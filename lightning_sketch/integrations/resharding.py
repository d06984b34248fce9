"""FSDP2 under any trainer: whether the trainer's own loading will do for a checkpoint, or its states must be moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding.agree import any_rank

#: Where an optimizer was saved: the path, and its number there.
Place = tuple[Path, int]


def needs_resharding(optimizers: Sequence[Any], places: Sequence[Place]) -> bool:
    """Whether `move` has to load these optimizers: some checkpoint is plain, or of another number of ranks.

    Collective. False where it cannot load all of them: an optimizer is not converted, or a checkpoint is not there.
    What there is to say about that, the trainer's own loading says.

    Args:
        optimizers: the trainer's, wrapped or not.
        places: where each was saved.

    Raises:
        ValueError: on all ranks: a checkpoint was altered or cannot be read, or was written under another policy.
            Nothing was changed then, and the trainer has not opened the file: torch would unpickle what we refuse.
    """
    return any_rank(lambda: _needs_resharding([unwrap(optimizer) for optimizer in optimizers], places))


def move(optimizers: Sequence[Any], places: Sequence[Place]) -> None:
    """Load the states of these optimizers, from whatever layout they were saved in. Collective."""
    from lightning_sketch.checkpoints.restore import restore  # slow to import

    for optimizer, (path, number) in zip(optimizers, places, strict=True):
        restore(optimizer, path, optimizer=number)


def accelerate_place(directory: Path, number: int) -> Place:
    """Where Accelerate puts an optimizer, and so does the Hugging Face Trainer: a directory if sharded, else a file."""
    sharded = directory / f"optimizer_{number}"
    return sharded if sharded.is_dir() else directory / (f"optimizer_{number}.bin" if number else "optimizer.bin"), 0


def _needs_resharding(optimizers: Sequence[Any], places: Sequence[Place]) -> bool:
    converted = [optimizer for optimizer in optimizers if isinstance(optimizer, CompressedOptimizer)]
    if len(converted) < len(optimizers) or not all(path.exists() for path, _ in places):
        return False
    from lightning_sketch.checkpoints.compatibility import needs_resharding  # slow to import
    from lightning_sketch.checkpoints.open import open_checkpoint

    moves = [
        needs_resharding(optimizer, open_checkpoint(path, optimizer.compression.names, optimizer=number).saved)
        for optimizer, (path, number) in zip(converted, places, strict=True)
    ]
    return any(moves)
