"""Read a checkpoint, whatever wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sketch.checkpoints.contents import SavedOptimizer, from_state_dict
from lightning_sketch.checkpoints.formats.deepspeed import rank_files, read_deepspeed, read_stage0, stage0_file
from lightning_sketch.checkpoints.formats.safe import load_file
from lightning_sketch.checkpoints.integrity import Piece, large, verify


@dataclass(frozen=True)
class Opened:
    """A checkpoint of which little was read: tensors stay in the files until a layer's states are asked for.

    Args:
        saved: the optimizer.
        unverified: large parts of the files, whose checksums have not been compared yet.
    """

    saved: SavedOptimizer
    unverified: Sequence[Piece]


def open_checkpoint(
    path: str | Path,
    names: Sequence[Sequence[str]] | None = None,
    *,
    optimizer: int = 0,
    order: Sequence[str] | None = None,
) -> Opened:
    """Read what a checkpoint says of itself; see `read_checkpoint`.

    Args:
        order: the names of all parameters in the model's order, for Lightning's files, which may number them by it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        saved, pieces = _open(path, names, optimizer, order)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Opened(saved, large(pieces))


def read_checkpoint(
    path: str | Path, names: Sequence[Sequence[str]] | None = None, *, optimizer: int = 0
) -> SavedOptimizer:
    """Read the optimizer of a checkpoint, all checksums verified.

    Args:
        path: a file of ``torch.save`` (an optimizer's state dict, or a Lightning checkpoint, or a dictionary that holds
            one state dict), or a directory of torch.distributed.checkpoint, of Lightning's or Accelerate's sharded
            checkpoints, or of DeepSpeed's ``save_checkpoint``. Files are loaded with ``weights_only=True``.
        names: for each parameter group the names of its parameters, for files that number them.
        optimizer: which one, where a Lightning checkpoint holds several.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds no optimizer that can be read, or was altered; the message says what it is.
    """
    found = open_checkpoint(path, names, optimizer=optimizer)
    try:
        verify(found.unverified)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found.saved


def _open(
    path: Path, names: Sequence[Sequence[str]] | None, optimizer: int, order: Sequence[str] | None
) -> tuple[SavedOptimizer, Sequence[Piece]]:
    if path.is_file():
        contents, pieces = load_file(path)
        state_dict = find_state_dict(contents, optimizer)
        if names is not None and order is not None and "optimizer_states" in contents:
            names = _as_numbered(state_dict, names, order)
        return from_state_dict(state_dict, names), pieces
    if files := rank_files(path):
        return read_deepspeed(files)
    if file := stage0_file(path):
        return read_stage0(file, names)
    from lightning_sketch.checkpoints.formats import dcp  # slow to import

    if dcp.is_dcp(path):
        stored = dcp.Directory(path)
        return dcp.read_dcp(stored, stored.root(optimizer))
    raise ValueError(
        "it is neither a torch.distributed.checkpoint directory (it has no .metadata, which is written last and so is "
        "missing where a save was interrupted) nor one of DeepSpeed's (it has neither zero_pp_rank files nor an "
        "mp_rank file)"
    )


def _as_numbered(
    state_dict: Mapping[str, Any], names: Sequence[Sequence[str]], order: Sequence[str]
) -> Sequence[Sequence[str]]:
    """The names of each group's parameters in the order of their numbers in a Lightning checkpoint.

    torch numbers parameters by their places in the optimizer. Lightning's full checkpoints of sharded models have their
    places in the model instead, sorted in each group.
    """
    by_model = [sorted(group, key=order.index) for group in names]
    if by_model == [list(group) for group in names]:
        return names
    numbers = [key for group in state_dict.get("param_groups", ()) for key in group["params"]]
    if numbers != list(range(len(numbers))):
        return by_model
    raise ValueError(
        "its parameters are numbered by their places in the optimizer or in the model, and nothing says by which: the "
        "optimizer has them in another order than the model. Give it each group's parameters in the model's order, or "
        "save with ModelParallelStrategy(save_distributed_checkpoint=True), which stores their names"
    )


def find_state_dict(saved: Any, number: int = 0) -> Mapping[str, Any]:
    """The optimizer's state dict inside what a trainer saved.

    Raises:
        ValueError: there is none, or it is not clear which.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"holds a {type(saved).__name__}, not a state dict")
    if "param_groups" in saved:
        return saved
    if "optimizer_states" in saved:  # Lightning
        states = list(saved["optimizer_states"])
        if not 0 <= number < len(states):
            raise ValueError(f"holds {len(states)} optimizers; there is no number {number}")
        return find_state_dict(states[number])
    inner = [value for value in saved.values() if isinstance(value, Mapping) and "param_groups" in value]
    if len(inner) != 1:
        raise ValueError(f"expected one optimizer's state dict in it, found {len(inner)}")
    return inner[0]
