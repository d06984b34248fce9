"""What all ranks must decide alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def joined() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def is_rank_zero() -> bool:
    """Whether this process says what is the same on all ranks."""
    return not joined() or dist.get_rank() == 0


def several_ranks() -> bool:
    """Whether other processes train beside this one."""
    return joined() and dist.get_world_size() > 1


#: Process groups, as of `reduce_together`, and the device of what lies on their ranks; each once.
Places = dict[tuple[tuple[int, ...], torch.device], tuple[Sequence[Any], torch.device]]


def place(ranks: Sequence[Any], device: torch.device) -> Places:
    """The place of something that is divided over ranks; nothing if it is over none."""
    return {(tuple(map(id, ranks)), device): (ranks, device)} if ranks else {}


def raise_together(problem: ValueError | None, places: Places, owner: str) -> None:
    """Raise on all ranks what any of them found. Collective over the ranks of `places`.

    Args:
        problem: what this rank found.
        places: where that is which it is about.
        owner: what it is about.

    Raises:
        ValueError: `problem`, or that another rank has one.
    """
    elsewhere = False
    for ranks, device in places.values():  # all of them, before any rank leaves
        bad = torch.tensor([float(problem is not None)], device=device)
        reduce_together(bad, ranks, largest=True)
        elsewhere |= bool(bad.item())
    if problem is None and elsewhere:
        problem = ValueError(f"{owner}: refused on another rank, whose error says why; nothing was changed here")
    if problem is not None:
        raise problem


def any_rank(decide: Callable[[], bool]) -> bool:
    """Whether any rank decides yes. Collective; if it raises on one rank, all raise.

    Ranks read checkpoints from file systems that may differ, and go separate ways into collectives if they disagree.

    Raises:
        ValueError: it raised on another rank; the message is that of the first.
    """
    yes, raised = False, None
    try:
        yes = decide()
    except Exception as error:  # whatever it is: the other ranks are waiting for an answer
        raised = error
    answers: list[tuple[bool, str | None]] = gather_objects((yes, None if raised is None else str(raised)))
    if raised is not None:
        raise raised
    for _, problem in answers:
        if problem is not None:
            raise ValueError(problem)
    return any(yes for yes, _ in answers)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order; of a single process its own. Collective."""
    if not joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_together(numbers: Tensor, ranks: Sequence[Any], *, largest: bool = False) -> None:
    """Add up numbers over ranks, or find the largest of each (modified in place). Collective.

    Args:
        ranks: process groups: of all ranks, or in turn those along each dimension of their mesh.

    Raises:
        RuntimeError: not all ranks came. The error of the process group is its cause.
    """
    if numbers.numel() == 0:
        return
    operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    try:
        for group in ranks:
            # Parameters that are offloaded are on the CPU, for which NCCL alone is no backend.
            kinds = sorted({device.type for device in getattr(group, "_device_types", ())})
            sent = numbers if not kinds or numbers.device.type in kinds else numbers.to(kinds[0])
            dist.all_reduce(sent, op=operation, group=group)
            if sent is not numbers:
                numbers.copy_(sent)
    except RuntimeError as error:
        raise RuntimeError(
            "the ranks could not agree on a step of compressed layers, which were not changed here: another rank did "
            "not come to this optimizer.step(), or failed in it, before the process group's timeout. Every rank must "
            "make the same steps; the first error of another rank says why it did not"
        ) from error
