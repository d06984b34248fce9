"""Tensor primitives in plain PyTorch: the specification of every faster kernel."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
#: By which `mix64` multiplies a seed: the golden ratio in 64 bits, signed.
FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)


def layer_seed(seed: int, fqn: str) -> int:
    """A 63-bit hash seed for one layer, so that layers collide independently.

    >>> layer_seed(0, "emb.weight") == layer_seed(0, "emb.weight") != layer_seed(0, "head.weight")
    True
    """
    digest = hashlib.blake2b(f"{seed}/{fqn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def mix64(x: Tensor, seed: int | Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014) of ``x + seed``, elementwise.

    Args:
        x: int64.
        seed: any integer; taken modulo 2**64. Or int64, 0-d, where it is known on the device alone.

    Returns:
        int64 with all 64 bits mixed (so negative numbers occur).
    """
    # int64 multiplication wraps; `>>` is arithmetic, so the sign bits it drags in are masked off.
    x = x + (seed * FACTOR if isinstance(seed, Tensor) else signed(seed * FACTOR))
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (1 << 33) - 1)


def hash_rows(row_ids: Tensor, seed: int, depth: int, width: int) -> tuple[Tensor, Tensor]:
    """Bucket and sign of rows, independent between depths.

    Args:
        row_ids: global row ids, int64 ``[k]``.
        seed: the layer's seed.
        depth: number of hash functions.
        width: buckets per hash function, below 2**31.

    Returns:
        buckets, int64 ``[depth, k]`` in ``[0, width)``; signs, int8 ``[depth, k]`` of -1 and 1.
    """
    bits = torch.stack([mix64(row_ids, seed + level + 1) for level in range(depth)])
    # The high 32 bits scaled to [0, width): no modulo, no bias worth naming (Lemire, ACM TOMACS 2019).
    buckets = (((bits >> 32) & _MASK32) * width) >> 32
    signs = ((bits & 1) * 2 - 1).to(torch.int8)
    return buckets, signs


def segment_add(table: Tensor, buckets: Tensor, values: Tensor) -> None:
    """``table[buckets[i]] += values[i]``, in the same order on every replica.

    Args:
        table: ``[width, ...]`` (modified in place).
        buckets: int64 ``[k]``, duplicates allowed.
        values: ``[k, ...]``.
    """
    # Elsewhere than on the CPU index_add_ is atomic, so DDP replicas would drift apart.
    if table.device.type == "cpu":
        table.index_add_(0, buckets, values)
    elif table.device.type == "cuda":
        table.index_put_((buckets,), values, accumulate=True)  # CUDA's and ROCm's sorts first; MPS's is atomic, too
    else:
        sorted_segment_add(table, buckets, values)


def sorted_segment_add(table: Tensor, buckets: Tensor, values: Tensor) -> None:
    """`segment_add` of nothing but sorting, gathering and elementwise operations, whose order no device may choose.

    Waits for the device once: the longest run of rows in one bucket says how many passes there are, its logarithm.
    """
    if buckets.numel() == 0:
        return
    buckets, order = buckets.sort(stable=True)
    sums = values.index_select(0, order)
    edges = torch.searchsorted(buckets, torch.arange(table.shape[0] + 1, device=table.device))  # where buckets begin
    counts = edges[1:] - edges[:-1]
    longest, reach = int(counts.max()), 1
    while reach < longest:  # then each row holds the sum of itself and of up to `2 * reach - 1` before it in its bucket
        same = over_rows(buckets[reach:] == buckets[:-reach], values.ndim)
        sums[reach:] += sums[:-reach].where(same, 0.0)
        reach *= 2
    last = sums.index_select(0, (edges[1:] - 1).clamp_min_(0))
    table += last.where(over_rows(counts > 0, values.ndim), 0.0)


def gather_min(table: Tensor, buckets: Tensor) -> Tensor:
    """Count-min estimate: ``min over depth of table[depth, buckets[depth]]``.

    Args:
        table: ``[depth, width, ...]``.
        buckets: int64 ``[depth, k]``.

    Returns:
        ``[k, ...]``, a new tensor.
    """
    estimate = table[0].index_select(0, buckets[0])
    for level in range(1, table.shape[0]):
        estimate = torch.minimum(estimate, table[level].index_select(0, buckets[level]))
    return estimate


def gather_median(table: Tensor, buckets: Tensor, signs: Tensor) -> Tensor:
    """Count-sketch estimate: median over depth of ``sign * table[depth, bucket]``; the mean of the middle two if even.

    Args:
        table: ``[depth, width, ...]``.
        buckets: int64 ``[depth, k]``.
        signs: ``[depth, k]`` of -1 and 1.

    Returns:
        ``[k, ...]``, a new tensor.
    """
    rows = [
        table[level].index_select(0, buckets[level]).mul_(over_rows(signs[level], table.ndim - 1))
        for level in range(table.shape[0])
    ]
    if len(rows) == 1:
        return rows[0]
    if len(rows) == 3:  # the default depth
        a, b, c = rows
        return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    # Bubble the smallest half down: elementwise minima are ten times faster than torch's sort along a short dimension,
    # which also keeps int64 indices.
    middle = len(rows) // 2
    for done in range(middle + 1):
        for i in range(len(rows) - 1, done, -1):
            rows[i - 1], rows[i] = torch.minimum(rows[i - 1], rows[i]), torch.maximum(rows[i - 1], rows[i])
    return rows[middle] if len(rows) % 2 else (rows[middle - 1] + rows[middle]) / 2


def row_mean(x: Tensor) -> Tensor:
    """Mean of each row: ``[k, ...]`` -> ``[k]``; rows of one number are their own mean."""
    return x.flatten(1).mean(dim=1) if x.ndim > 1 else x


def over_rows(vector: Tensor, ndim: int) -> Tensor:
    """View ``[k]`` as ``[k, 1, ..., 1]`` of `ndim` dimensions, to broadcast over rows."""
    return vector.view(-1, *[1] * (ndim - 1))


def signed(x: int) -> int:
    """The 64-bit two's complement of `x`."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x
