"""An upper bound for "hot rows exact, tail sketched": the most frequent rows are known in advance.

In `benchmarks.gcide` word ids are frequency ranks, so the hot rows of both tables are the first ones. A codec that had
to find them online could at best do as well; it is worth building only if this one wins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_sketch.codecs import Codec, CodecState, CountSketch, StateSpec, Tensors
from lightning_sketch.codecs.decay import decayed
from lightning_sketch.codecs.state import Count, Number
from lightning_sketch.sharding import Block


@dataclass(frozen=True)
class HotRows(Codec):
    """Half of the bytes hold the first rows exactly, half a count-min sketch of depth 1 of the others.

    Args:
        compression: of the whole, against the dense state.
    """

    compression: float = 20.0

    def hot(self, rows: int) -> int:
        """How many rows are exact."""
        return int(rows / (2 * self.compression))

    def tail(self) -> CountSketch:
        return CountSketch(compression=2 * self.compression, depth=1)

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        hot = spec.zeros(self.hot(spec.shard.global_rows), *spec.shard.row_shape)
        return {"hot": hot, "hot_scale": 1.0, **self.tail().allocate(spec)}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"hot": (None, *range(1, ndim)), **self.tail().axes(ndim)}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return _HotRows(spec, tensors, self.tail().bind(spec, tensors))


class _HotRows(CodecState):
    """Expects sparse gradients, whose rows come sorted."""

    def __init__(self, spec: StateSpec, tensors: Tensors, tail: CodecState) -> None:
        super().__init__(spec, tensors)
        self.hot: Tensor = self["hot"]
        self.tail = tail

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self["hot_scale"] = decayed(self["hot_scale"], float(decay), (self.hot,))
        self.weight = weight
        self.tail.begin(decay=decay, weight=weight, step=step, rows=rows)

    def add(self, block: Block, x: Tensor) -> None:
        hot, n, tail = self._split(block)
        self.hot.index_add_(0, hot, x[:n], alpha=self.weight / self["hot_scale"])
        self.tail.add(tail, x[n:])

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.estimate(block)

    def estimate(self, block: Block) -> Tensor:
        hot, n, tail = self._split(block)
        found = self.hot.new_empty(block.size, *self.spec.shard.row_shape)
        found[:n] = self.hot.index_select(0, hot) * self["hot_scale"]
        found[n:] = self.tail.estimate(tail)
        return found

    def _split(self, block: Block) -> tuple[Tensor, int, Block]:
        assert isinstance(block.index, Tensor)
        n = int((block.index < self.hot.shape[0]).sum())
        return block.index[:n], n, replace(block, index=block.index[n:], span=slice(0, block.size - n), _memo={})
