"""Rows of a gradient added to the buckets of a sketch on an accelerator, in two launches for all of its depths.

``torch.embedding_bag`` adds up chosen rows, each with a sign, in the order of a list: so rows sorted by bucket, which
blocks of one gradient share, give the same bits every time. `segment_add` is ten launches for each depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bags(NamedTuple):
    """Rows of a gradient by block, level of the sketch and bucket.

    Args:
        rows: for each place, which of its block's rows lies there: int64 ``[depth * k]``.
        signs: the row's sign there, of the values' dtype.
        begins: where each bucket begins, int64 ``[blocks * depth * width]``.
    """

    rows: Tensor
    signs: Tensor
    begins: Tensor


def sort_into_bags(buckets: Tensor, signs: Tensor, width: int, cut_into: int, dtype: torch.dtype) -> Bags:
    """Sort rows that are cut into blocks.

    Args:
        buckets: of all rows of a gradient, int64 ``[depth, k]``.
        signs: ``[depth, k]`` of -1 and 1.
        width: number of buckets of each depth.
        cut_into: how many rows each block has; the last may have fewer.
        dtype: of the values.
    """
    depth, k = buckets.shape
    device = buckets.device
    block = torch.arange(k, device=device).div_(cut_into, rounding_mode="floor")
    level = torch.arange(depth, device=device).unsqueeze(1)
    keys = block.mul_(depth).add(level).mul_(width).add_(buckets).flatten()
    keys, order = keys.sort(stable=True)
    blocks = -(-k // cut_into)
    begins = torch.searchsorted(keys, torch.arange(blocks * depth * width, device=device))
    return Bags(order.remainder(k).remainder_(cut_into), signs.flatten().index_select(0, order).to(dtype), begins)


def bags_bytes(rows: int, depth: int, width: int, blocks: int, itemsize: int) -> int:
    """The most bytes that `sort_into_bags` asks for, what it returns among them."""
    return depth * rows * (5 * 8 + itemsize) + 8 * rows + 2 * 8 * blocks * depth * width


def bag_sums(x: Tensor, bags: Bags, shape: tuple[int, int], span: slice, cut_into: int, *, signed: bool) -> Tensor:
    """Sums of a block's rows in every bucket of every level: ``[depth, width, *row_shape]``, a new tensor.

    Args:
        x: the block's rows, ``[k, *row_shape]``.
        bags: of all rows of the gradient.
        shape: ``(depth, width)`` of the table.
        span: which of these rows are the block's.
        signed: whether signs count.
    """
    depth, width = shape
    places = slice(depth * span.start, depth * span.stop)
    number = span.start // cut_into
    begins = bags.begins[number * depth * width : (number + 1) * depth * width]
    sums: Tensor = torch.ops.aten._embedding_bag_forward_only(
        x.reshape(x.shape[0], -1),
        bags.rows[places],
        begins if number == 0 else begins - places.start,
        per_sample_weights=bags.signs[places] if signed else None,
    )[0]
    return sums.view(depth, width, *x.shape[1:])


def is_batched(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` runs over a tensor: `bag_sums` would be launched once for each of its parts."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))
