"""Rows by bucket of a sketch: sorted for many layers at once, and kept where they are the same at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sketch.kernels.schema import FusedStep, KernelState
from lightning_sketch.kernels.triton import layout

LIMIT = 1 << 31  # what int32 holds


class Batch:
    """Memory of layers that are sorted together: one sort by level of a layer and bucket.

    An entry is a row at one level of a layer's sketch; levels of a layer lie one behind the other, as layers do. Keys
    number the buckets of all of them in the same way.

    Attributes:
        order: int32 ``[entries]``: keys until they are sorted, then numbers of entries by key.
        edges: int32: by bucket, ``[keys + 1]``: the first in `order` of each key; by row, ``[entries]``: after the last
            in `order` that has the same key.
        keys: sorted keys, int32 ``[entries]``; by row only.
    """

    def __init__(self, by_bucket: bool) -> None:
        self.by_bucket = by_bucket
        self.entries = self.buckets = 0
        self.rows = 0  # of the layer that was added last
        self.width = 0

    def add(self, rows: int, sketch: KernelState) -> bool:
        """Make room for a layer, if that is not too much to be sorted at once; one alone always has room."""
        entries, buckets = rows * sketch.depth, sketch.width * sketch.depth
        if self.entries and (self.entries + entries > layout.WAVE or self.buckets + buckets >= LIMIT):
            return False
        self.entries, self.buckets = self.entries + entries, self.buckets + buckets
        self.rows, self.width = rows, sketch.width
        return True

    def allocate(self, device: torch.device) -> None:
        """Memory, once all layers have been added."""
        if max(self.entries, self.buckets) >= LIMIT:
            raise ValueError(
                f"CountSketch: {self.entries:,} rows times hash functions and {self.buckets:,} buckets in one layer; "
                "kernels on CUDA devices take less than 2**31 of either. Use fewer hash functions (depth), or set "
                "LIGHTNING_SKETCH_KERNELS=reference."
            )
        self.order = torch.empty(self.entries, dtype=torch.int32, device=device)
        self.edges = torch.empty(self.buckets + 1 if self.by_bucket else self.entries, dtype=torch.int32, device=device)
        self.keys = None if self.by_bucket else torch.empty_like(self.order)

    def tensors(self) -> list[Tensor]:
        """The memory."""
        return [self.order, self.edges] + ([] if self.keys is None else [self.keys])

    def sort(self) -> None:
        """Sort the keys that are in `order`; rows with the same one stay in their order."""
        if self.entries > layout.WAVE and self.by_bucket:  # a layer on its own
            for level in range(self.entries // self.rows):
                self._sort_level(level)
            return
        keys, order = self.order.sort(stable=True)
        if self.keys is None:
            edges = torch.arange(self.buckets + 1, dtype=torch.int32, device=keys.device)
            torch.searchsorted(keys, edges, out_int32=True, out=self.edges)
        else:
            torch.searchsorted(keys, keys, right=True, out_int32=True, out=self.edges)
            self.keys.copy_(keys)
        self.order.copy_(order)

    def _sort_level(self, level: int) -> None:
        """One level of the only layer, in waves: what lies before a wave's rows of a bucket is counted."""
        rows, width, first = self.rows, self.width, level * self.rows
        order = self.order[first : first + rows]
        keys = order - level * width
        buckets = torch.arange(width + 1, dtype=torch.int32, device=keys.device)
        waves = range(0, rows, layout.WAVE)
        edges = torch.full_like(buckets, first)
        for start in waves:
            found = keys[start : start + layout.WAVE].sort().values
            edges += torch.searchsorted(found, buckets, out_int32=True)
        self.edges[level * width : (level + 1) * width + 1] = edges
        edges -= first
        for start in waves:
            found, entries = keys[start : start + layout.WAVE].sort(stable=True)
            of_wave = torch.searchsorted(found, buckets, out_int32=True)
            at = torch.arange(len(found), device=keys.device)
            at += (edges - of_wave).index_select(0, found)
            order.index_copy_(0, at, (entries + (first + start)).to(torch.int32))
            edges[:-1] += of_wave.diff()


@dataclass(frozen=True, slots=True)
class Order:
    """Where in a batch a layer lies.

    Args:
        entry, key: its first ones.
        of: what the order depends on, the number of rows first.
    """

    batch: Batch
    entry: int
    key: int
    of: tuple[int, ...]

    def words(self) -> tuple[int, int, int, int, int, int]:
        """Words of `table`."""
        batch = self.batch
        keys = 0 if batch.keys is None else batch.keys.data_ptr()
        return batch.order.data_ptr(), batch.edges.data_ptr(), keys, self.entry, self.key, self.of[0]


@dataclass
class Sorting:
    """Orders of the rows of some layers by one of their sketches.

    Args:
        steps: of these layers.
        orders: of each.
        is_pending: whether each is to be filled by `sort`, after its keys.
        batches: memory of those.
    """

    steps: list[FusedStep]
    orders: list[Order]
    is_pending: list[bool]
    batches: list[Batch]

    def runs(self) -> list[tuple[int, int]]:
        """Beginnings and ends of the pending layers that lie side by side."""
        edges = [at for at in range(len(self.orders) + 1) if self._pends(at) != self._pends(at - 1)]
        return list(zip(edges[::2], edges[1::2], strict=True))

    def _pends(self, at: int) -> bool:
        return 0 <= at < len(self.orders) and self.is_pending[at]

    def sort(self, which: int) -> None:
        """Sort, and keep what steps of all rows will need again."""
        for batch in self.batches:
            batch.sort()
        for step, order, is_pending in zip(self.steps, self.orders, self.is_pending, strict=True):
            if is_pending and step.ids is None and step.cache is not None:
                step.cache.orders[which] = order


def find_orders(layers: Sequence[tuple[FusedStep, KernelState]], by_bucket: bool, which: int) -> Sorting:
    """Orders of layers' rows by their sketches: those that were kept, and memory for the others.

    Args:
        by_bucket: whether `Batch.edges` are needed for every bucket, else for every row.
        which: of `StepCache.orders`.
    """
    found = Sorting([step for step, _ in layers], [], [], [])
    for step, sketch in layers:
        of = (step.grad.shape[0], step.row_offset, *layout.hashing(sketch))
        kept: Order | None = step.cache.orders[which] if step.ids is None and step.cache is not None else None
        found.is_pending.append(kept is None or kept.of != of)
        if kept is None or kept.of != of:
            batch = found.batches[-1] if found.batches else Batch(by_bucket)
            entry, key = batch.entries, batch.buckets
            if not batch.add(of[0], sketch):
                batch, entry, key = Batch(by_bucket), 0, 0
                batch.add(of[0], sketch)
            if not entry:
                found.batches.append(batch)
            kept = Order(batch, entry, key, of)
        found.orders.append(kept)
    for batch in found.batches:
        batch.allocate(layers[0][0].grad.device)
    return found


def kept_bytes(rows: int, sketch_shapes: Sequence[tuple[int, int]]) -> int:
    """Device memory of the orders that are kept for a layer's dense steps.

    Args:
        sketch_shapes: depth and width of its sketches; those that are the same share an order.
    """
    return sum(4 * (depth * (rows + width) + 1) for depth, width in set(sketch_shapes))


def sorting_bytes(rows: int, sketch_shapes: Sequence[tuple[int, int]]) -> int:
    """Device memory that sorting a layer's rows takes beside `kept_bytes`: torch's keys, indices and buffers."""
    return max((28 * min(depth * rows, layout.WAVE) + 20 * width for depth, width in sketch_shapes), default=0)
