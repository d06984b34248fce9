"""DTensor parameters, cut by rows or by columns: FSDP2's ``fully_shard``, tensor parallelism, or both."""

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


def sharded_mesh_dims(param: Any, fqn: str) -> tuple[int, ...]:
    """The mesh dimensions over which a DTensor is sharded, in the order in which they cut it; none if it is replicated.

    Under FSDP2 with tensor parallelism the latter cuts first, which FSDP2's placement, a ``_StridedShard``, says.

    Raises:
        TypeError: its placements are not supported.
    """
    placements, mesh = param.placements, param.device_mesh
    found: list[int] = []
    for i in reversed(range(len(placements))):
        kind = type(placements[i]).__name__
        if kind == "Replicate":
            continue
        cut_before = placements[i].split_factor if kind == "_StridedShard" else 1
        counts = [math.prod(mesh.size(j) for j in found[:k]) for k in range(len(found) + 1)]
        if kind not in ("Shard", "_StridedShard") or cut_before not in counts:
            raise TypeError(_unsupported(param, fqn))
        found.insert(counts.index(cut_before), i)
    found = [i for i in found if mesh.size(i) > 1] or found[:1]
    if len({placements[i].dim for i in found}) > 1 or any(placements[i].dim > 1 for i in found):
        raise TypeError(_unsupported(param, fqn))
    parts, dim = math.prod(mesh.size(i) for i in found), placements[found[0]].dim if found else 0
    if len(found) > 1 and param.shape[dim] % parts:
        # Placements may then say otherwise than FSDP2 cuts (50,257 rows on 4 x 2 ranks), and checkpoints go by them.
        raise TypeError(
            f"{fqn} is a DTensor with placements {placements} over {parts} ranks, which do not divide its "
            f"{param.shape[dim]} {('rows', 'columns')[dim]} evenly. Pad it to a multiple of {parts}, or keep it by a "
            f"first rule without codecs, Rule(name={fqn!r})"
        )
    return tuple(found)


def _unsupported(param: Any, fqn: str) -> str:
    return (
        f"{fqn} is a DTensor with placements {param.placements}. lightning_sketch compresses DTensors that are sharded "
        "by rows (Shard(0), FSDP2's default) or by columns (Shard(1)), over any number of mesh dimensions, and "
        "replicated over the others, but not by both at once, as FSDP2 makes of tensor parallelism's RowwiseParallel "
        "linear layers; keep such layers by a first rule without codecs, as Rule(name='*.down_proj.weight'), or shard "
        "them so"
    )


def ranks_of(param: Any, fqn: str) -> tuple[Any, ...]:
    """The process groups over which a DTensor is sharded, one for each mesh dimension; none if it is replicated.

    Raises:
        TypeError: its placements are not supported.
    """
    return tuple(param.device_mesh.get_group(i) for i in sharded_mesh_dims(param, fqn))


def sharding_of(param: Any, fqn: str) -> tuple[int, int]:
    """Number of shards of a parameter, and the dimension they are cut along; ``(1, 0)`` if it is whole.

    Raises:
        TypeError: its placements are not supported.
    """
    mesh_dims = sharded_mesh_dims(param, fqn) if is_dtensor(param) else ()
    shards = math.prod(param.device_mesh.size(i) for i in mesh_dims)
    return (1, 0) if shards == 1 else (shards, param.placements[mesh_dims[0]].dim)


def shard_of(param: Any, fqn: str) -> Shard:
    """The shard that a DTensor's local tensor is.

    Raises:
        TypeError: its placements are not supported.
        RuntimeError: its local tensor is not what its placements say.
    """
    shape, held = tuple(param.shape), tuple(param.to_local().shape)
    mesh_dims, mesh = sharded_mesh_dims(param, fqn), param.device_mesh
    if not mesh_dims:
        return Shard.whole(shape)
    parts, index = 1, 0
    for mesh_dim in mesh_dims:
        parts, index = parts * mesh.size(mesh_dim), index * mesh.size(mesh_dim) + mesh.get_local_rank(mesh_dim)
    shard = even_shard(shape, param.placements[mesh_dims[0]].dim, parts, index, agree=True)
    if held != (shard.local_rows, *shard.row_shape):
        raise RuntimeError(
            f"{fqn}: a DTensor of shape {list(shape)} and placements {param.placements} on {parts} ranks "
            f"should hold {[shard.local_rows, *shard.row_shape]} here, but holds {list(held)}"
        )
    return shard


def kept_shard_of(param: Any, fqn: str) -> Shard:
    """Where the local tensor of a layer that is kept lies: it may be cut by rows and by columns at once.

    Raises:
        TypeError: it is cut along another dimension.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, held = tuple(param.shape), tuple(param.to_local().shape)
    sizes, starts = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if tuple(sizes) != held or sizes[2:] != shape[2:]:
        raise TypeError(_unsupported(param, fqn))
    if sizes[1:] == shape[1:]:
        return Shard(shape, row_offset=starts[0], local_rows=sizes[0])
    offset = starts[1] * math.prod(shape[2:])
    return Shard(shape, row_offset=starts[0], local_rows=sizes[0], part_shape=sizes[1:], column_offset=offset)


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
