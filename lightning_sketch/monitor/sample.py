"""Which rows of a layer are watched, and their part of a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sketch.kernels.reference import over_rows
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.gradient import RowGradient


def choose_rows(gradient: RowGradient, seed: int, count: int) -> Tensor:
    """The rows to be watched: half of them from those that have a gradient now, half from all.

    Under sparse gradients most rows of a table hardly ever occur. A row drawn from those of one gradient is one that
    occurs often, whose moments count; a row drawn from all shows what collisions put where nothing should be.

    Args:
        gradient: the first that the layer has; where it is dense, rows of zeros have none. Reads it.
        seed: of the layer.
        count: how many rows, at most.

    Returns:
        local ids, int64 ``[n]``, ascending, on the gradient's device.
    """
    shard, device = gradient.shard, gradient.values.device
    total = shard.local_rows if shard.row_numel else 0
    if total <= count:
        return torch.arange(total, device=device)
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    occurring = _occurring(gradient, shard).cpu()
    drawn: list[int] = []
    if len(occurring):  # more are drawn than are wanted, for some will be drawn twice
        drawn += occurring[torch.randint(len(occurring), (8 * count,), generator=generator, device="cpu")].tolist()
    first = list(dict.fromkeys(drawn))[: count - count // 2]
    others = torch.randint(total, (8 * count,), generator=generator, device="cpu").tolist()
    return torch.tensor(sorted(list(dict.fromkeys([*first, *others]))[:count]), device=device)


def _occurring(gradient: RowGradient, shard: Shard) -> Tensor:
    if gradient.rows is not None:
        return gradient.rows
    largest: Tensor = torch.linalg.vector_norm(gradient.values.reshape(shard.local_rows, -1), ord=torch.inf, dim=1)
    return (largest != 0).nonzero().flatten()


def take_rows(gradient: RowGradient, rows: Tensor, *, lazy: bool) -> tuple[Tensor, Tensor | None]:
    """Some rows of a gradient, copied.

    Args:
        rows: local ids, int64 ``[n]``.
        lazy: whether all-zero rows of a dense gradient count as absent.

    Returns:
        values ``[n, *row_shape]``, 0 where a row is absent; and which are present, bool ``[n]``, ``None`` for all.
    """
    given = gradient.values
    if gradient.rows is None:
        values = given.index_select(0, rows)
        return values, all_of_rows(values == 0).logical_not() if lazy else None
    if gradient.rows.numel() == 0:
        return given.new_zeros(len(rows), *given.shape[1:]), torch.zeros_like(rows, dtype=torch.bool)
    at = torch.searchsorted(gradient.rows.contiguous(), rows).clamp_(max=gradient.rows.numel() - 1)
    present = gradient.rows[at] == rows
    return given.index_select(0, at).masked_fill_(over_rows(~present, given.ndim), 0.0), present


def all_of_rows(true: Tensor) -> Tensor:
    """Of which rows all elements are True, bool ``[n]``; also where there are no rows."""
    return true if true.ndim == 1 else true.flatten(1).all(dim=1)
