"""Layers that are divided over ranks which agree: what lies where in the buffer of all that they add."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs.shared import Shared, Sharing
from lightning_sketch.sharding import Cut, Shard
from lightning_sketch.sharding.agree import reduce_together


@dataclass(frozen=True, eq=False)
class SharedLayer:
    """A layer with states that several ranks share. It follows from the plan, and is the same on all of them.

    Args:
        fqn: the parameter's name.
        shape: its global shape.
        cut: how it is divided.
        sharing: what the ranks agree on in every step, by state.
        cut_rows: global ids of the rows that lie on several ranks, ascending, where it is cut anywhere.
    """

    fqn: str
    shape: tuple[int, ...]
    cut: Cut
    sharing: Mapping[str, Sharing]
    cut_rows: tuple[int, ...] = ()

    @functools.cached_property
    def rows(self) -> int:
        """How many rows lie on several ranks."""
        return self.shape[0] if self.cut == "columns" else len(self.cut_rows)

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """Numbers in the buffer of sums, and in that of the largest."""
        sizes = [1 + self._marks, 0]
        for sharing in self.sharing.values():
            sizes[sharing.largest] += (sharing.rows * self.rows + sharing.whole) * (1 + sharing.lazy)
        return sizes[0], sizes[1]

    @functools.cached_property
    def _marks(self) -> int:
        # Sums of rows say which are to be left out: they are NaN. The largest do not.
        summed = any(sharing.rows and not sharing.largest for sharing in self.sharing.values())
        return 0 if summed else self.rows

    def lay_out(self, sums: Tensor, largest: Tensor) -> Slots:
        """Its numbers in the buffers, of as many as `sizes` says."""
        slots = Slots(self, sums[0], None, {})
        at = [1, 0]

        def take(size: int, which: int) -> Tensor | None:
            start = at[which]
            at[which] += size
            return (sums, largest)[which][start : start + size] if size else None

        marks = take(self._marks, 0)
        for state, sharing in self.sharing.items():
            rows, whole = sharing.rows * self.rows, sharing.whole
            shared = slots.states[state] = Shared(whole=take(whole, sharing.largest), ids=self._ids(sums.device))
            shared.all_rows = take(rows, sharing.largest)
            if sharing.lazy:
                shared.touched, shared.all_touched = take(whole, 0), take(rows, 0)
            if not sharing.largest and shared.all_rows is not None:
                marks = shared.all_rows
        slots.marks = marks
        return slots

    def _ids(self, device: torch.device) -> Tensor | None:
        if self.cut == "columns":
            return None
        if device not in self._ids_on:
            self._ids_on[device] = torch.tensor(self.cut_rows, dtype=torch.int64, device=device)
        return self._ids_on[device]

    @functools.cached_property
    def _ids_on(self) -> dict[torch.device, Tensor]:
        return {}

    def own_rows(self, shard: Shard) -> slice | None:
        """Which of the rows that lie on several ranks are a shard's; ``None`` for none."""
        if self.cut == "columns":
            return slice(0, self.rows)
        if not shard.is_cut_row:
            return None
        at = self.cut_rows.index(shard.row_offset)
        return slice(at, at + 1)


@dataclass(slots=True)
class Slots:
    """Numbers of a layer in the buffers, of this rank and then of all.

    Args:
        shared: the layer.
        present: how many ranks have a gradient of it, 0-d.
        marks: of the rows that lie on several ranks, ``[m]``: NaN where one is to be left out; ``None`` if none does.
        states: of each state that is shared, without what is of one part only.
    """

    shared: SharedLayer
    present: Tensor
    marks: Tensor | None
    states: dict[str, Shared]

    def of_shard(self, shard: Shard, state: str) -> Shared:
        """The numbers of a state as a shard of the layer sees them."""
        found, own = self.states[state], self.shared.own_rows(shard)

        def cut(rows: Tensor | None) -> Tensor | None:
            return None if rows is None or own is None else rows[own]

        rows, touched = cut(found.all_rows), cut(found.all_touched)
        return replace(found, rows=rows, touched_rows=touched)

    def marks_of(self, shard: Shard) -> Tensor | None:
        """`marks` of a shard's rows, ``[local_rows]``; ``None`` if none of them lies on another rank."""
        own = self.shared.own_rows(shard)
        return None if own is None or self.marks is None else self.marks[own]


class Buffer:
    """What layers that are divided over the same ranks add, laid out in the same way on all of them.

    Args:
        layers: in the plan's order.
        device: of their parameters.
        dtype: float32, or float64 where a parameter is.

    Attributes:
        sums, largest: the numbers, zeros at first; those of which ranks look for the largest are apart.
        slots: each layer's, by name.
    """

    def __init__(self, layers: Sequence[SharedLayer], device: torch.device, dtype: torch.dtype) -> None:
        sizes = [layer.sizes for layer in layers]
        self.sums, self.largest = (
            torch.zeros(sum(size[i] for size in sizes), dtype=dtype, device=device) for i in (0, 1)
        )
        sums = torch.split(self.sums, [size for size, _ in sizes])
        largest = torch.split(self.largest, [size for _, size in sizes])
        self.slots = {layer.fqn: layer.lay_out(*views) for layer, *views in zip(layers, sums, largest, strict=True)}

    def reduce(self, ranks: Sequence[Any]) -> None:
        """Have the ranks add up what they wrote. Collective; see `reduce_together`."""
        reduce_together(self.sums, ranks)
        reduce_together(self.largest, ranks, largest=True)
