"""Lightning's FSDP2: load checkpoints that are plain, or of another number of ranks, into converted optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sketch.integrations.resharding import move, needs_resharding
from lightning_sketch.sharding.agree import any_rank


class ReshardingLoad:
    """Stands in for ``ModelParallelStrategy.load_checkpoint``, for one call.

    Lightning loads model and optimizers in that one method, after ``on_fit_start``. Where states have to be moved, it
    is shown no optimizer and loads the model alone, and `lightning_sketch.checkpoints.restore` loads the states.

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
        places = [(path, number) for number in range(len(optimizers))]
        if not self._in_model_order() and any_rank(path.is_file):
            return self._load_unmoved(checkpoint_path, *args, **kwargs)
        if not needs_resharding(optimizers, places):
            return self.original(checkpoint_path, *args, **kwargs)
        self.strategy.optimizers = []
        try:
            rest = self.original(checkpoint_path, *args, **kwargs)
        finally:
            self.strategy.optimizers = optimizers
        move(optimizers, places)
        return rest

    def _load_unmoved(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.original(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{error}\nStates of a full checkpoint are moved between layouts only where every parameter group has "
                "its parameters in the model's order, by which Lightning numbers them in the file. Order them so, or "
                "save with ModelParallelStrategy(save_distributed_checkpoint=True), which stores their names"
            ) from error

    def _in_model_order(self) -> bool:
        """Whether the parameters of each group are in the order in which the model has them.

        Lightning's full checkpoints number parameters by their places in the model and sort each group by them, so that
        only then the n-th of a group in the file is the n-th of the live one. Lightning itself goes by the numbers.
        """
        place = {id(param): number for number, param in enumerate(self.strategy.model.parameters())}
        groups = [group for optimizer in self.strategy.optimizers for group in optimizer.param_groups]
        places = [[place.get(id(param), -1) for param in group["params"]] for group in groups]
        return all(numbers == sorted(numbers) for numbers in places)

    def undo(self) -> None:
        """Leave the strategy as it was."""
        if self.strategy.__dict__.get("load_checkpoint") is self:
            del self.strategy.load_checkpoint
