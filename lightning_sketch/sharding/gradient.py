"""A gradient as rows: the one form that update rules and codecs see, whether torch gave it dense or sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_sketch.kernels import coalesced_rows
from lightning_sketch.kernels.schema import MOST_MEAN
from lightning_sketch.sharding import Block, Shard
from lightning_sketch.sharding.base import ACCELERATOR_BLOCKS


@dataclass  # not frozen: that triples what making one costs, and every step makes them
class RowGradient:
    """Rows of a gradient; not to be modified.

    Args:
        shard: the parameter's shard.
        rows: local row ids, int64 ``[k]``, sorted and without duplicates; ``None`` when every row is present.
        values: ``[k, *row_shape]``, or ``[local_rows, *row_shape]`` when `rows` is ``None``; the parameter's dtype.
        left_out: how many rows that were not finite are absent already, 0-d int64; ``None`` for none.
        most_blocks: into how many blocks an accelerator's may be cut, see `Shard.blocks`.
    """

    shard: Shard
    rows: Tensor | None
    values: Tensor
    left_out: Tensor | None = None
    most_blocks: int = ACCELERATOR_BLOCKS

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The rows in blocks; made once, so that a block's hashes outlive one pass over the gradient."""
        return tuple(self.shard.blocks(self.rows, self.values.device, self.most_blocks))

    def forget_blocks(self) -> None:
        """Let go of the blocks and of what they remember: gradients outlive the step of their layer."""
        self.__dict__.pop("blocks", None)

    def touched_only(self, *, leave_out: bool = False) -> RowGradient:
        """The same gradient without its all-zero rows (lazy semantics: an absent row does not decay).

        Args:
            leave_out: whether rows that are not finite are absent, too.
        """
        values = self.values
        finite = finite_rows(values) if leave_out else None
        left_out = None if finite is None else finite.logical_not().sum()
        if self.rows is not None:
            if finite is None:
                return self
            return RowGradient(self.shard, self.rows[finite], values[finite], left_out)
        if values.numel() == 0:  # no rows here, of states whose scale must be that of other ranks
            nothing = torch.empty(0, dtype=torch.int64, device=values.device)
            return RowGradient(self.shard, nothing, values[:0])
        touched = (values != 0).reshape(self.shard.local_rows, -1).any(dim=1)
        rows = (touched if finite is None else touched & finite).nonzero().flatten()
        return RowGradient(self.shard, rows, values[rows], left_out)


def finite_rows(values: Tensor) -> Tensor | None:
    """Which rows are finite.

    Args:
        values: ``[k, *row_shape]``.

    Returns:
        bool ``[k]``; ``None`` for all, where that is known without waiting for a device.
    """
    if values.numel() == 0 or (values.device.type == "cpu" and all_finite(values)):
        return None
    largest: Tensor = torch.linalg.vector_norm(values.reshape(values.shape[0], -1), ord=torch.inf, dim=1)
    return largest.isfinite()


def small_rows(values: Tensor) -> Tensor | None:
    """Which rows are finite and have a mean of squares below `MOST_MEAN`. As in `finite_rows`."""
    if values.numel() == 0:
        return None
    rows = values.reshape(values.shape[0], -1)
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
    good = norm < math.sqrt(MOST_MEAN * rows.shape[1])
    return None if values.device.type == "cpu" and all_finite(norm.where(good, torch.inf)) else good


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite; waits for their device."""
    # A finite sum has finite terms only, and summing is the fastest pass there is, without temporaries. A sum that is
    # not finite may just have overflowed, so then look closer.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(total.isfinite()) or bool(values.isfinite().all())


def row_gradient(grad: Tensor, shard: Shard, fqn: str) -> RowGradient:
    """Read a dense or sparse COO gradient as rows. Duplicates of an uncoalesced gradient are summed.

    Raises:
        TypeError: the layout is neither strided nor sparse COO, or rows themselves are sparse.
    """
    if grad.layout is torch.strided:
        return RowGradient(shard, None, shard.as_rows(grad))
    if grad.layout is not torch.sparse_coo:
        raise TypeError(
            f"the gradient of {fqn} has layout {grad.layout}; dense gradients and row-sparse COO gradients "
            "(nn.Embedding(sparse=True)) are supported"
        )
    if grad.sparse_dim() != 1:
        raise TypeError(
            f"the gradient of {fqn} is sparse in {grad.sparse_dim()} dimensions; only row-sparse gradients "
            "(sparse_dim == 1) are supported"
        )
    return RowGradient(shard, *coalesced_rows(grad))
