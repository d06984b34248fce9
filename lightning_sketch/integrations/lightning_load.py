"""Lightning's FSDP2: load checkpoints that are plain, or of another number of ranks, into converted optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sketch.classes import unwrap
from lightning_sketch.optimizer import CompressedOptimizer
from lightning_sketch.sharding.agree import any_of_all


class MovingLoad:
    """Stands in for ``ModelParallelStrategy.load_checkpoint``, for one call.

    Lightning loads model and optimizers in that one method, after ``on_fit_start``. Where states have to be moved, it
    is shown no optimizer and loads the model alone, and `lightning_sketch.portable.restore` loads the states.

    Args:
        strategy: the strategy, patched at once.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.original = strategy.load_checkpoint
        strategy.load_checkpoint = self

    def __call__(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        self.undo()
        optimizers = list(self.strategy.optimizers)
        path = Path(self.strategy.broadcast(checkpoint_path))
        if not any_of_all(lambda: _must_move(optimizers, path)):
            return self.original(checkpoint_path, *args, **kwargs)
        from lightning_sketch.portable import restore

        self.strategy.optimizers = []
        try:
            rest = self.original(checkpoint_path, *args, **kwargs)
        finally:
            self.strategy.optimizers = optimizers
        for number, optimizer in enumerate(optimizers):
            restore(optimizer, path, optimizer=number)
        return rest

    def undo(self) -> None:
        """Leave the strategy as it was."""
        if self.strategy.__dict__.get("load_checkpoint") is self:
            del self.strategy.load_checkpoint


def _must_move(optimizers: list[Any], path: Path) -> bool:
    """Whether some optimizer's states must be moved, and all can be."""
    inner = [unwrap(optimizer) for optimizer in optimizers]
    converted = [optimizer for optimizer in inner if isinstance(optimizer, CompressedOptimizer)]
    if len(converted) < len(inner):
        return False  # Lightning finds an optimizer's states by its number, so it loads all of them or none
    from lightning_sketch.portable import read_checkpoint
    from lightning_sketch.portable.fit import must_move

    moves = False
    for number, optimizer in enumerate(converted):
        try:
            saved = read_checkpoint(path, optimizer._compression.names, optimizer=number)
        except (FileNotFoundError, ValueError):
            return False  # nothing we can read: let Lightning say what is wrong, or load it
        moves |= must_move(optimizer, saved)
    return moves
