"""What all ranks of a shard group must decide alike."""

from __future__ import annotations

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
        device: where the group's backend communicates.
    """
    agreed = list(flags)
    for group in {id(g): g for g in groups if g is not None}.values():
        places = [i for i, g in enumerate(groups) if g is group]
        votes = torch.tensor([flags[i] for i in places], dtype=torch.int32, device=device)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
        for i, vote in zip(places, votes.tolist(), strict=True):
            agreed[i] = bool(vote)
    return agreed
