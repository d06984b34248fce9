"""DTensor parameters: FSDP2's ``fully_shard``, by rows or by columns, over one dimension of the mesh."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lightning_sketch.sharding.base import Shard


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    # By name: importing torch.distributed.tensor costs half a second that a single process need not pay.
    return type(tensor) not in (Tensor, nn.Parameter) and any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds: the local part of a DTensor, or the tensor itself. Shares memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient, placed as its parameter is.

    Tensor parallelism leaves that of a table cut by rows replicated, and that of a replicated norm as a sum yet to be
    made. A collective then, as in torch's own step.
    """
    if not is_dtensor(grad) or grad.placements == param.placements:  # type: ignore[attr-defined]
        return grad
    placed: Tensor = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return placed


def show_shards(model: nn.Module) -> None:
    """Have every parameter of a model under ``fully_shard`` be the shard that its optimizer steps.

    After a forward pass without a backward one, such as validation, FSDP2 leaves the gathered parameters of its root in
    their place.
    """
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def sharded_mesh_dim(param: Any, fqn: str) -> int | None:
    """The mesh dimension over which a DTensor is sharded; ``None`` if it is replicated.

    Raises:
        TypeError: its placements are not supported.
    """
    placements = param.placements
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not sharded:
        return None
    plain = type(placements[sharded[0]]).__name__ == "Shard"
    if len(sharded) > 1 or not plain or placements[sharded[0]].dim > 1:
        raise TypeError(
            f"{fqn} is a DTensor with placements {placements}. lightning_sketch compresses DTensors that are sharded "
            "over one mesh dimension, by rows (Shard(0), FSDP2's default) or by columns (Shard(1)), and replicated "
            "over the others, so FSDP2 or tensor parallelism, not both; keep this layer with a policy that does "
            "not match it, or shard it so"
        )
    return sharded[0]


def ranks_of(param: Any, fqn: str) -> Any:
    """The process group over which a DTensor is sharded; ``None`` if it is replicated.

    Raises:
        TypeError: its placements are not supported.
    """
    mesh_dim = sharded_mesh_dim(param, fqn)
    return None if mesh_dim is None else param.device_mesh.get_group(mesh_dim)


def shard_of(param: Any, fqn: str) -> Shard:
    """The shard that a DTensor's local tensor is.

    Raises:
        TypeError: its placements are not supported.
        RuntimeError: its local tensor is not what its placements say.
    """
    shape, held = tuple(param.shape), tuple(param.to_local().shape)
    mesh_dim = sharded_mesh_dim(param, fqn)
    if mesh_dim is None:
        return Shard.whole(shape)
    dim, mesh = param.placements[mesh_dim].dim, param.device_mesh
    shard = even_shard(shape, dim, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim), agree=True)
    if held != (shard.local_rows, *shard.row_shape):
        raise RuntimeError(
            f"{fqn}: a DTensor of shape {list(shape)} and placements {param.placements} on {mesh.size(mesh_dim)} ranks "
            f"should hold {[shard.local_rows, *shard.row_shape]} here, but holds {list(held)}"
        )
    return shard


def even_shard(shape: tuple[int, ...], dim: int, parts: int, index: int, *, agree: bool = False) -> Shard:
    """Part `index` of `parts` along dimension 0 or 1, cut as ``torch.chunk`` does: the last may be smaller or empty.

    Args:
        agree: whether ranks agree on what they add to shared states; see `Shard.cut`.
    """
    agree = agree and parts > 1
    each = -(-shape[dim] // parts)
    start = min(index * each, shape[dim])
    size = min(each, shape[dim] - start)
    if dim == 0:
        return Shard(shape, row_offset=start, local_rows=size, even_rows=each, cut="rows" if agree else None)
    inner = math.prod(shape[2:])
    return Shard(
        shape,
        row_offset=0,
        local_rows=shape[0],
        part_shape=(size, *shape[2:]),
        column_offset=start * inner,
        even_columns=each * inner,
        cut="columns" if agree else None,
    )
