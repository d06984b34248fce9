"""Dense states into stored ones and back, block by block, and how far apart they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec, allocate
from lightning_sketch.codecs.state import CodecState, StateSpec, Tensors, key_of
from lightning_sketch.sharding import Block, Shard
from lightning_sketch.sharding.fake import is_fake

#: A dense state asked for block by block: ``[k, *row_shape]``, any floating dtype, not modified.
Rows = Callable[[Block], Tensor]


def rows_of(dense: Tensor | Rows, shard: Shard) -> Rows:
    """A dense state ``[local_rows, *row_shape]`` (or 0-d), block by block."""
    if not isinstance(dense, Tensor):
        return dense
    rows = shard.as_rows(dense)
    return lambda block: rows[block.index]


def encode(codec: Codec, spec: StateSpec, dense: Tensor | Rows, step: int = 1) -> dict[str, Any]:
    """Store a dense state, block by block.

    Args:
        dense: ``[local_rows, *row_shape]`` (or 0-d), or a function that is asked two or three times for every block.
        step: number of the step that the state is of; codecs that round at random draw other noise at each.

    Returns:
        tensors under their keys in ``optimizer.state[param]``.
    """
    return Encoding(codec, spec, dense, step).finish()


class Encoding:
    """A dense state that is being stored; see `encode`. Ranks that share it may agree on it before it is finished.

    Attributes:
        fill: the initial value, by which values are less; ranks that share the state must have the same.
        tensors, state: from `begin` on.
    """

    def __init__(self, codec: Codec, spec: StateSpec, dense: Tensor | Rows, step: int = 1) -> None:
        self.codec, self.spec, self.step = codec, spec, step
        self.tensors: dict[str, Any] = {}
        self.state: CodecState | None = None
        self._rows = rows_of(dense, spec.shard)
        self._blocks = tuple(spec.shard.blocks(device=spec.device))
        self.fill = spec.fill
        if self.fill:
            # Less than that (zeros, to reset a sum) would be a negative number, in a bucket that other rows share.
            smallest = min((float(self._rows(block).min()) for block in self._blocks), default=self.fill)
            self.fill = min(self.fill, smallest)

    def begin(self) -> CodecState:
        """Allocate the state."""
        self.tensors = allocate(self.codec, dataclasses.replace(self.spec, fill=self.fill))
        self.state = state = self.codec.bind(self.spec, self.tensors)
        return state

    def values(self) -> Iterator[tuple[Block, Tensor]]:
        """What is to be added, by blocks."""
        for block in self._blocks:
            # A fresh state holds the initial value already; rows that share a bucket must not add theirs on top.
            values = self._rows(block).to(self.spec.dtype)
            yield block, values - self.fill if self.fill else values

    def finish(self) -> dict[str, Any]:
        """Tensors under their keys in ``optimizer.state[param]``."""
        state = self.begin() if self.state is None else self.state
        state.begin(decay=1.0, weight=1.0, step=self.step, rows=None)
        for block, values in self.values():
            state.add(block, values)
        state.settle()
        for block, values in self.values():
            state.read(block, values)
        state.commit()
        return self.tensors


def check_finite(codec: Codec, spec: StateSpec, dense: Tensor | Rows) -> None:
    """Refuse a dense state that is to be stored and holds NaN or inf: a codec would spread it over other elements.

    Where it would not, because each element has a number of its own, or the state is dropped, anything goes.

    Args:
        dense: as of `encode`.

    Raises:
        ValueError: naming layer and state.
    """
    ndim = max(1, len(spec.shard.global_shape))
    if codec.drops or all(axes == tuple(range(ndim)) for axes in codec.axes(ndim).values()):
        return
    rows = rows_of(dense, spec.shard)
    bad = torch.zeros((), dtype=torch.int64, device="cpu")
    for block in spec.shard.blocks(device=spec.device):
        values = rows(block)
        if is_fake(values):
            return
        bad = bad.to(values.device) + values.isfinite().logical_not().sum()
    if count := int(bad):
        name = spec.name.rpartition(".")[2]
        raise ValueError(
            f"{spec.fqn}: its {name} holds NaN or inf in {count} of {spec.shard.local_rows * spec.shard.row_numel:_} "
            f"elements, which {codec} would spread over others. Set them to 0 (state[~state.isfinite()] = 0), or store "
            "this state in BFloat16() or Keep(), which keep elements apart"
        )


def decode(codec: Codec, spec: StateSpec, tensors: Tensors) -> Tensor:
    """The dense state, ``[local_rows, *row_shape]`` in the parameter's dtype, as torch.optim would keep it."""
    dense = torch.empty(spec.local_shape, dtype=spec.param_dtype, device=spec.device)
    rows = _estimates(codec, spec, tensors)
    for block in spec.shard.blocks(device=spec.device):
        dense[block.index] = rows(block).to(dense.dtype)
    return dense


def widened(old: Codec, new: Codec, spec: StateSpec, tensors: Tensors) -> dict[str, Any]:
    """A state in more buckets, of which every row is estimated as before.

    What the old buckets mixed up stays mixed up until it has decayed; what is added from now on has the new ones.
    Encoding the estimates anew would be worse: in a bucket they add up, and each holds the sum of one already.

    Args:
        old: how `tensors` are stored.
        new: ``old.wider(spec.shard)``.

    Returns:
        tensors under their keys in ``optimizer.state[param]``.
    """
    before, after = (codec.table_shape(spec.shard) or codec.row_table_shape(spec.shard) for codec in (old, new))
    if before is not None and after == (before[0], 2 * before[1]):
        # Buckets are the high bits of a hash times the width, so the rows of bucket b go into 2 b and 2 b + 1.
        table, scale = key_of(spec.name, "table"), key_of(spec.name, "scale")
        return {table: tensors[table].repeat_interleave(2, dim=1), scale: tensors[scale]}
    return transcode(old, new, spec, tensors)


def transcode(old: Codec, new: Codec, spec: StateSpec, tensors: Tensors) -> dict[str, Any]:
    """What a state says of every row, stored by another codec, block by block; tensors as of `encode`."""
    return encode(new, spec, _estimates(old, spec, tensors))


def relative_error(codec: Codec, spec: StateSpec, tensors: Tensors, dense: Tensor | Rows) -> float:
    """``||decoded - dense|| / ||dense||`` in the Frobenius norm; 0 for an all-zero state that is stored exactly.

    NaN of fake tensors, which have no values.
    """
    rows, stored = rows_of(dense, spec.shard), _estimates(codec, spec, tensors)
    error = norm = 0.0
    for block in spec.shard.blocks(device=spec.device):
        true = rows(block).to(spec.dtype)
        if is_fake(true):
            return math.nan
        error += float((stored(block) - true).square().sum(dtype=torch.float64))
        norm += float(true.square().sum(dtype=torch.float64))
    return relative_norm(error, norm)


def relative_norm(error: float, norm: float) -> float:
    """The ratio of two norms, of their squares: 0 if both are 0, infinite if the second is."""
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / norm)


def _estimates(codec: Codec, spec: StateSpec, tensors: Tensors) -> Rows:
    """What a stored state says of every row."""
    state = codec.bind(spec, tensors)
    return lambda block: state.estimate(block).expand(block.size, *spec.shard.row_shape)
