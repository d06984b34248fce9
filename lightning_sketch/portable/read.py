"""Read a checkpoint, whatever wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sketch.portable.deepspeed import rank_files, read_deepspeed
from lightning_sketch.portable.safe import load_file
from lightning_sketch.portable.saved import SavedOptimizer, from_state_dict


def read_checkpoint(
    path: str | Path, names: Sequence[Sequence[str]] | None = None, *, optimizer: int = 0
) -> SavedOptimizer:
    """Read the optimizer of a checkpoint.

    Args:
        path: a file of ``torch.save`` (an optimizer's state dict, or a Lightning checkpoint, or a dictionary that holds
            one state dict), or a directory of torch.distributed.checkpoint, of Lightning's or Accelerate's sharded
            checkpoints, or of DeepSpeed's ``save_checkpoint``. Files are loaded with ``weights_only=True``.
        names: for each parameter group the names of its parameters, for files that number them.
        optimizer: which one, where a Lightning file holds several.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds no optimizer that can be read; the message says what it is.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        if path.is_file():
            return from_state_dict(find_state_dict(load_file(path), optimizer), names)
        if files := rank_files(path):
            return read_deepspeed(files)
        from lightning_sketch.portable import dcp  # slow to import

        if dcp.is_dcp(path):
            return dcp.read_dcp(path, optimizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    raise ValueError(
        f"{path} is neither a torch.distributed.checkpoint directory (it has no .metadata) nor one of DeepSpeed's "
        "(it has no zero_pp_rank files)"
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
