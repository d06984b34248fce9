"""What all ranks of a shard group must decide alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sketch.sharding.dtensor import is_dtensor, sharded_mesh_dim


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
        votes = torch.tensor([flags[i] for i in places], dtype=torch.int32, device=_vote_device(group, device))
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
        for i, vote in zip(places, votes.tolist(), strict=True):
            agreed[i] = bool(vote)
    return agreed


def any_of_all(decide: Callable[[], bool]) -> bool:
    """Whether any rank decides yes. Collective; what one rank raises as ValueError, all raise.

    Ranks read checkpoints from file systems that may differ, and go separate ways into collectives if they disagree.
    """
    try:
        answer: tuple[bool, str | None] = (decide(), None)
    except ValueError as error:
        answer = (False, str(error))
    answers: list[Any] = [answer]
    if dist.is_available() and dist.is_initialized():
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer)
    problem = next((problem for _, problem in answers if problem is not None), None)
    if problem is not None:
        raise ValueError(problem)
    return any(yes for yes, _ in answers)


def _vote_device(group: Any, device: torch.device) -> torch.device:
    """A device on which the group's backend communicates: `device` if it can be."""
    pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
    kinds = {kind for kind, colon, _ in pairs if colon}
    if not kinds or device.type in kinds:
        return device
    kind = sorted(kinds)[0]
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())
