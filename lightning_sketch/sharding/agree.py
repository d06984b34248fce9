"""What all ranks of a shard group must decide alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sketch.sharding.dtensor import is_dtensor, sharded_mesh_dim


def is_rank_zero() -> bool:
    """Whether this process says what is the same on all ranks."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def shard_group(param: Tensor, fqn: str) -> Any | None:
    """The process group over which a DTensor is sharded; ``None`` for a parameter that is whole."""
    if not is_dtensor(param):
        return None
    mesh_dim = sharded_mesh_dim(param, fqn)
    return None if mesh_dim is None else param.device_mesh.get_group(mesh_dim)  # type: ignore[attr-defined]


def all_agree(flags: list[bool], groups: list[Any | None], device: torch.device) -> list[bool]:
    """Combine each flag over its process group: true where it is true on every rank.

    A collective: all ranks of a group must call it with the same number of flags of that group, in the same order.

    Args:
        groups: for each flag its process group, or ``None`` if it concerns this rank only.
        device: where the tensors are; with CPU offload, a group may communicate elsewhere.
    """
    agreed = list(flags)
    if not any(group is not None for group in groups):
        return agreed
    for group in {id(g): g for g in groups if g is not None}.values():
        places = [i for i, g in enumerate(groups) if g is group]
        votes = torch.tensor([flags[i] for i in places], dtype=torch.int32, device=vote_device(group, device))
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
        for i, vote in zip(places, votes.tolist(), strict=True):
            agreed[i] = bool(vote)
    return agreed


def any_of_all(decide: Callable[[], bool]) -> bool:
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
    answers: list[tuple[bool, str | None]] = from_all((yes, None if raised is None else str(raised)))
    if raised is not None:
        raise raised
    for _, problem in answers:
        if problem is not None:
            raise ValueError(problem)
    return any(yes for yes, _ in answers)


def from_all(value: Any) -> list[Any]:
    """The values of all ranks, in rank order; of a single process its own. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def vote_device(group: Any, device: torch.device) -> torch.device:
    """A device of this process on which `group` communicates: `device` if it can be, else the CPU, else its own kind.

    A group has one backend for each kind of device, and a collective takes the one for its tensor's: a group that was
    made with "nccl" has none for the CPU, where CPU offload keeps the tensors, and one with "cpu:gloo,cuda:nccl" has.

    Args:
        device: where the tensors are.
    """
    pairs = dist.get_backend_config(group).split(",")  # such as "cpu:gloo,cuda:nccl", also where it was made with one
    kinds = [kind for kind, _, _ in (pair.partition(":") for pair in pairs)]
    if device.type in kinds:
        return device
    if "cpu" in kinds:
        return torch.device("cpu")
    bound: torch.device | None = getattr(group, "bound_device_id", None)  # what init_process_group(device_id=...) says
    return bound if bound is not None else torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
