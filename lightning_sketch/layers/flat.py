"""Layers inside the flat tensors that DeepSpeed gives an optimizer instead of the model's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sketch.codecs import Keep
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.roles import NamedLayer
from lightning_sketch.layers.shared import SharedLayer
from lightning_sketch.sharding import Cut, Shard
from lightning_sketch.sharding.deepspeed import FlatLayout, Segment
from lightning_sketch.text import short, table


@dataclass(frozen=True)
class NamedSegment:
    """A run of elements of one parameter in a flat tensor, as checkpoints record it.

    Args:
        fqn: the parameter's name.
        shape: its logical shape.
        start: first element in the flat tensor.
        length: number of elements.
        offset: first element within the flattened parameter.
    """

    fqn: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int

    def to_list(self) -> list[Any]:
        """Primitives, for checkpoints."""
        return [self.fqn, list(self.shape), self.start, self.length, self.offset]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> NamedSegment:
        fqn, shape, start, length, offset = values
        return cls(fqn, tuple(shape), start, length, offset)


@dataclass(frozen=True)
class Place:
    """Elements side by side in a flat tensor whose states are kept alike.

    Args:
        fqns: the layers; several only if they are kept.
        start: first element in the flat tensor.
        length: number of elements.
        part: the part of a compressed layer, or ``None`` for kept ones.
    """

    fqns: tuple[str, ...]
    start: int
    length: int
    part: LayerPart | None


@dataclass(frozen=True)
class FlatTensor:
    """One flat tensor of the optimizer.

    Args:
        tensor: the tensor, ``[numel]``.
        segments: the parameters in it, in order; gaps are padding.
        parts: what our rules step: every compressed layer's part, and runs of kept ones. Empty if all are kept, here
            and on all other ranks: then torch's own step has the tensor.
        names_on_any_rank: names of all parameters of which any rank holds a piece in its counterpart.
        shared: of these the layers with states that ranks share.
    """

    tensor: Tensor
    segments: tuple[NamedSegment, ...]
    parts: tuple[LayerPart, ...]
    names_on_any_rank: tuple[str, ...]
    shared: tuple[SharedLayer, ...] = ()

    def to_list(self) -> list[list[Any]]:
        """The segments as primitives, for checkpoints."""
        return [segment.to_list() for segment in self.segments]

    @property
    def padding(self) -> int:
        """Number of elements that belong to no parameter."""
        return self.tensor.numel() - sum(segment.length for segment in self.segments)

    def places(self) -> list[Place]:
        """What lies in it, in order."""
        found = [
            Place((p.layer.fqn,), p.span.start, p.shard.local_rows * p.shard.row_numel, p)
            for p in self.parts
            if p.layer.compressed and p.span is not None
        ]
        compressed = {place.fqns[0] for place in found}
        for segment in self.segments:
            if segment.fqn not in compressed:
                found.append(Place((segment.fqn,), segment.start, segment.length, None))
        joined: list[Place] = []
        for place in sorted(found, key=lambda place: place.start):
            last = joined[-1] if joined else None
            if last and last.part is place.part is None and last.start + last.length == place.start:
                joined[-1] = Place(last.fqns + place.fqns, last.start, last.length + place.length, None)
            else:
                joined.append(place)
        return joined


class FlatTensors:
    """All flat tensors of this rank, bound once to the engine's layout.

    Args:
        layout: from `lightning_sketch.sharding.deepspeed.read_layout`.
        layers: the model's parameters by id.
        records: compressed layers by FQN.

    Raises:
        RuntimeError: a parameter in the layout is not the model's, or has another shape than was planned.
    """

    def __init__(
        self, layout: FlatLayout, layers: Mapping[int, NamedLayer], records: Mapping[str, LayerRecord]
    ) -> None:
        self.engine, self.ranks = layout.engine, () if layout.ranks is None else (layout.ranks,)
        cut: Cut | None = "anywhere" if self.ranks else None
        self._by_id: dict[int, FlatTensor] = {}
        for (tensor, found), on_any_rank, borders in zip(
            layout.tensors, layout.params_on_any_rank, layout.borders, strict=True
        ):
            segments = tuple(_named(segment, layers, layout.engine) for segment in found)
            for segment in segments:
                if segment.fqn in records and records[segment.fqn].shape != segment.shape:
                    raise RuntimeError(
                        f"{segment.fqn} was planned with shape {list(records[segment.fqn].shape)}, but "
                        f"{layout.engine} holds it as {list(segment.shape)}; compress the optimizer again"
                    )
            # All ranks step it alike: its state has the same entries everywhere.
            names = tuple(layers[id(param)].fqn for param in on_any_rank if id(param) in layers)
            # Only those of the same group: others may keep other states.
            here = {fqn: records[fqn] for fqn in names if fqn in records}
            parts = flat_parts(segments, here, cut) if here else ()
            at = {layers[id(p)].fqn: x for p, x in zip(on_any_rank, borders, strict=True) if id(p) in layers}
            shared = () if cut is None else tuple(_shared(here[fqn], at[fqn]) for fqn in names if fqn in here)
            shared = tuple(layer for layer in shared if layer.sharing)
            self._by_id[id(tensor)] = FlatTensor(tensor, segments, parts, names, shared)

    @property
    def divided(self) -> bool:
        """Whether they are divided over ranks. FP16_UnfusedOptimizer, of stage 0, has all on each."""
        return self.engine != "FP16_UnfusedOptimizer"

    def find(self, tensor: Tensor) -> FlatTensor | None:
        """The flat tensor that is `tensor`."""
        return self._by_id.get(id(tensor))

    def __iter__(self) -> Iterator[FlatTensor]:
        return iter(self._by_id.values())

    def __str__(self) -> str:
        """Which rows of which layers lie in the flat tensors on this rank, and how their states are kept."""
        columns = ("flat tensor", ">elements", "layer", "rows", "columns", "state: codec")
        return table(f"{self.engine}: what this rank's flat tensors hold", columns, self._rows())

    def _rows(self) -> Iterator[tuple[str, ...] | None]:
        for number, flat in enumerate(self):
            for place in flat.places():
                span = f"{place.start:,}:{place.start + place.length:,}"
                if place.part is None:
                    first, last, count = place.fqns[0], place.fqns[-1], len(place.fqns)
                    names = first if count == 1 else f"{first} ... {last} ({count} layers)"
                    yield str(number), span, names, "", "", "kept as they are"
                    continue
                shard, codecs = place.part.shard, place.part.layer.codecs
                cut = f"{shard.column_offset:,}:{shard.column_offset + shard.row_numel:,}"
                yield (
                    str(number),
                    span,
                    place.fqns[0],
                    f"{shard.row_offset:,}:{shard.row_offset + shard.local_rows:,} of {shard.global_rows:,}",
                    "all" if shard.part_shape is None else cut,
                    "\n".join(f"{state}: {short(codec)}" for state, codec in codecs.items()),
                )
            if flat.padding:
                yield str(number), "", f"padding, {flat.padding:,} elements", "", "", ""
            yield None


def _shared(layer: LayerRecord, borders: Sequence[int]) -> SharedLayer:
    columns = math.prod(layer.shape[1:])
    cut_rows = {border // columns for border in borders if border % columns}
    return SharedLayer(layer.fqn, layer.shape, "anywhere", layer.sharing("anywhere"), tuple(sorted(cut_rows)))


def _named(segment: Segment, layers: Mapping[int, NamedLayer], engine: str) -> NamedSegment:
    named = layers.get(id(segment.param))
    if named is None:
        raise RuntimeError(
            f"{engine} optimizes a parameter of shape {list(segment.shape)} that is not a parameter of the model given "
            "to compress(); compress the optimizer with the model that the engine trains"
        )
    return NamedSegment(named.fqn, segment.shape, segment.start, segment.length, segment.offset)


def flat_parts(
    segments: Sequence[NamedSegment], records: Mapping[str, LayerRecord], cut: Cut | None = None
) -> tuple[LayerPart, ...]:
    """What our rule steps. Kept layers that lie side by side become one part: one kernel call for all.

    Where nothing but padding is here, there is one empty part.

    Args:
        cut: "anywhere" where ranks agree on the states that they share.
    """
    parts = tuple(_flat_parts(segments, records, cut))
    return parts or (_kept_run(0, 0, records),)


def _flat_parts(
    segments: Sequence[NamedSegment], records: Mapping[str, LayerRecord], cut: Cut | None
) -> Iterator[LayerPart]:
    start = stop = 0  # of the kept run
    for segment in segments:
        # Padding between segments is uninitialized memory under ZeRO-3: a run that crossed it would keep NaN as states.
        if stop > start and (segment.fqn in records or segment.start != stop):
            yield _kept_run(start, stop, records)
            start = stop
        if segment.fqn in records:
            yield from layer_parts(records[segment.fqn], segment, cut)
        else:
            start = start if stop > start else segment.start
            stop = segment.start + segment.length
    if stop > start:
        yield _kept_run(start, stop, records)


def _kept_run(start: int, stop: int, records: Mapping[str, LayerRecord]) -> LayerPart:
    signed = next(iter(records.values())).signed
    layer = LayerRecord("kept layers", 0, (stop - start,), signed, {state: Keep() for state in signed})
    return LayerPart(layer, Shard.whole(layer.shape), slice(start, stop), f"[{start}:{stop}].")


def layer_parts(layer: LayerRecord, segment: NamedSegment, cut: Cut | None = None) -> Iterator[LayerPart]:
    """A compressed layer's segment as shards: whole rows, and before and after them a row that the border cuts.

    A cut row is a row of fewer columns. What its states share with those of the other ranks' columns, ranks agree on.
    """
    columns = math.prod(layer.shape[1:])
    position, stop = segment.offset, segment.offset + segment.length
    while position < stop:
        row, column = divmod(position, columns)
        if column == 0 and stop - position >= columns:
            rows = (stop - position) // columns
            shard, length = Shard(layer.shape, row, rows, cut=cut), rows * columns
        else:
            length = min(columns - column, stop - position)
            shard = Shard(layer.shape, row, 1, part_shape=(length,), column_offset=column, cut=cut)
        start = segment.start + position - segment.offset
        prefix = f"{layer.fqn}[{position}:{position + length}]."
        yield LayerPart(layer, shard, slice(start, start + length), prefix)
        position += length
