"""Ranks that share states, in one process: what they add is added up by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import Codec, StateSpec, decode, key_of
from lightning_sketch.layers.flat import NamedSegment, layer_parts
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.layers.reshard import Source
from lightning_sketch.layers.shared import Buffer, SharedLayer
from lightning_sketch.sharding import Cut, Shard
from lightning_sketch.sharding.dtensor import even_shard
from tests.codecs.harness import make_spec

NAME = "exp_avg_sq"


class Ranks:
    """A state of a layer as the ranks hold it that share it.

    Args:
        codec: how it is stored.
        shape: of the layer.
        cut: how it is divided; ``None`` for one process.
        ranks: how many.
        borders: of "anywhere", after how many elements a rank's piece ends.
    """

    def __init__(
        self, codec: Codec, shape: tuple[int, ...], cut: Cut | None, ranks: int = 1, borders: Sequence[int] = ()
    ) -> None:
        self.codec, self.shape = codec, shape
        sharing = None if cut is None else codec.sharing(shape, cut)
        columns = math.prod(shape[1:])
        cut_rows = tuple(sorted({border // columns for border in borders if border % columns}))
        by_state = {} if sharing is None else {NAME: sharing}
        self.layer = None if cut is None else SharedLayer("layer.weight", shape, cut, by_state, cut_rows)
        self.specs: list[StateSpec] = []
        self.rank_of: list[int] = []
        for rank, shards in enumerate(_shards(shape, cut, ranks, borders)):
            for shard in shards:
                self.specs.append(make_spec(shape, shard=shard))
                self.rank_of.append(rank)
        self.tensors: list[dict[str, Any]] = [
            {key_of(NAME, suffix): value for suffix, value in codec.allocate(spec).items()} for spec in self.specs
        ]

    def ema(self, x: Tensor, beta: float = 0.9) -> None:
        """One step of all ranks with non-negative values ``[rows, ...]``."""
        states = [self.codec.bind(spec, tensors) for spec, tensors in zip(self.specs, self.tensors, strict=True)]
        parts = [part_of(x, spec.shard) for spec in self.specs]
        if self.layer is not None and self.layer.sharing:
            buffers = [Buffer([self.layer], torch.device("cpu"), torch.float32) for _ in range(max(self.rank_of) + 1)]
            for rank, spec, state, part in zip(self.rank_of, self.specs, states, parts, strict=True):
                state.share(buffers[rank].slots["layer.weight"].of_shard(spec.shard, NAME))
                state.offer()
                for block in spec.shard.blocks() if state.observes else ():
                    state.observe(block, part[block.index])
                state.finish_observing(None)
            sums = torch.stack([buffer.sums for buffer in buffers]).sum(dim=0)
            largest = torch.stack([buffer.largest for buffer in buffers]).amax(dim=0)
            for buffer in buffers:
                buffer.sums.copy_(sums)
                buffer.largest.copy_(largest)
        for spec, state, part in zip(self.specs, states, parts, strict=True):
            if state.shared is not None and state.observes_agreed:
                for block in spec.shard.blocks():
                    state.observe_agreed(block, part[block.index])
            state.begin(decay=beta, weight=1 - beta, step=1, rows=None)
            for block in spec.shard.blocks():
                state.add(block, part[block.index])
            state.settle()
            for block in spec.shard.blocks():
                state.read(block, part[block.index])
            state.commit()

    def sources(self) -> list[Source]:
        """As a checkpoint gives them."""
        pairs = zip(self.specs, self.tensors, strict=True)
        return [Source(spec.shard, tensors, self.codec, spec.seed, spec.signed) for spec, tensors in pairs]

    def decoded(self) -> list[Tensor]:
        """What every part holds, dense."""
        return [decode(self.codec, spec, dict(x)) for spec, x in zip(self.specs, self.tensors, strict=True)]


def _shards(shape: tuple[int, ...], cut: Cut | None, ranks: int, borders: Sequence[int]) -> list[list[Shard]]:
    if cut is None:
        return [[Shard.whole(shape)]]
    if cut != "anywhere":
        return [[even_shard(shape, 0 if cut == "rows" else 1, ranks, i, agree=True)] for i in range(ranks)]
    found = []
    record = LayerRecord("layer.weight", 7, shape, {NAME: False}, {})
    for start, stop in itertools.pairwise([0, *borders, math.prod(shape)]):
        segment = NamedSegment("layer.weight", shape, 0, stop - start, start)
        found.append([part.shard for part in layer_parts(record, segment, "anywhere")])
    return found


def part_of(dense: Tensor, shard: Shard) -> Tensor:
    """A shard's part of a whole tensor, ``[local_rows, *row_shape]``."""
    rows = dense.reshape(shard.global_rows, -1)[shard.row_offset : shard.row_offset + shard.local_rows]
    held = rows[:, shard.column_offset : shard.column_offset + shard.row_numel]
    return held.reshape(shard.local_rows, *shard.row_shape)


def alone(shard: Shard) -> Shard:
    """The shard of a rank that shares nothing, as older versions had it."""
    return replace(shard, cut=None)
