"""Move compressed states from one set of shards to another: other ranks, other engines, or one process.

Rows are asked for in blocks from the shards that hold them and encoded anew, so nothing the size of the parameter is
ever made beside the new states. Where old and new shards agree, tensors are taken as they are. Otherwise the codecs
that keep a number per row or per element come out as they were, up to rounding; sketches are queried and filled again,
which adds the collisions of the new table to those of the old, and the relative error says how much. States that ranks
share are one process's: their parts are put together, and cut out again, as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import (
    Codec,
    Rows,
    StateSpec,
    check_finite,
    encode,
    key_of,
    relative_error,
    rows_of,
    scale_tensor,
)
from lightning_sketch.sharding import Block, Shard
from lightning_sketch.sharding.base import BLOCK_NUMEL


class LazyTensor(ABC):
    """A tensor that is not in memory. What is asked for is read when it is asked for."""

    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @abstractmethod
    def narrow(self, dim: int, start: int, length: int) -> LazyTensor:
        """``tensor.narrow``; reads nothing."""

    @abstractmethod
    def __getitem__(self, index: int) -> LazyTensor:
        """``tensor[index]``; reads nothing."""

    @abstractmethod
    def read(self, device: torch.device | None = None) -> Tensor:
        """All of it. Beside what is returned, no more than some rows are in memory."""


@dataclass(frozen=True)
class Source:
    """A state as one old shard holds it.

    Args:
        shard: which part of the layer.
        tensors: the codec's tensors, in memory or not, under their keys without prefix, e.g. ``exp_avg_sq_row``; a
            dense state under the state's own name alone.
        codec: how it is stored; ``None`` for a dense state, ``[local_rows, *row_shape]``.
        seed: hash seed it was stored under.
        signed: whether its values may be negative.
    """

    shard: Shard
    tensors: Mapping[str, Any]
    codec: Codec | None
    seed: int = 0
    signed: bool = False

    def same_encoding(self, codec: Codec, spec: StateSpec) -> bool:
        """Whether codec and hashes are those of another."""
        return (self.codec, self.seed, self.signed) == (codec, spec.seed, spec.signed)


def reshard(codec: Codec, spec: StateSpec, sources: Sequence[Source]) -> tuple[dict[str, Any], float]:
    """The state of a new shard from those of old ones.

    Args:
        codec: of the new state.
        spec: of the new state; its name may have a prefix.
        sources: parts that cover the new shard; more is welcome, and less is an error.

    Returns:
        tensors under their keys in ``optimizer.state[param]``, and the relative error against the sources' estimates.

    Raises:
        ValueError: an element of the new shard is in no source, or in two; or a dense source holds NaN or inf.
    """
    plain = replace(spec, name=spec.name.rpartition(".")[2])
    shared = _is_shared(codec, spec.shard)

    def as_it_is(source: Source) -> dict[str, Any] | None:
        """A copy of a source that is of the same shard, and stored alike."""
        same = source.shard == spec.shard if shared else replace(source.shard, cut=spec.shard.cut) == spec.shard
        if not (same and source.same_encoding(codec, spec) and _fits(codec, plain, source.tensors)):
            return None
        scale_key = key_of(plain.name, "scale")  # on the CPU
        devices = {key: value.device if key == scale_key else spec.device for key, value in source.tensors.items()}
        return rename({key: _copy(value, devices[key]) for key, value in source.tensors.items()})

    def rename(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {spec.name + key.removeprefix(plain.name): value for key, value in tensors.items()}

    # Also of what is each rank's own until they agree again.
    if found := next(filter(None, map(as_it_is, sources)), None):
        check_coverage(spec, [source.shard for source in sources])
        return found, 0.0
    sources = _joined(plain, sources)
    if not any(math.prod(source.shard.local_shape) for source in sources):
        shared = False  # nothing but a fresh state is there
    # Of a state that ranks share each holds something of the whole layer.
    wanted = replace(spec, shard=Shard.whole(spec.shard.global_shape)) if shared else spec
    useful = [source for source in sources if _overlap(source.shard, wanted.shard) is not None]
    check_coverage(wanted, [source.shard for source in useful])
    _check_shapes(plain, useful)

    if found := next(filter(None, map(as_it_is, useful)), None):
        return found, 0.0
    if codec.joins_columns and all(_same_rows(codec, source, spec) for source in useful):
        return rename(_join_columns(codec, plain, useful)), 0.0
    if shared:
        whole, error = useful[0], 0.0
        of_layer = replace(plain, shard=wanted.shard)
        if len(useful) > 1 or not whole.same_encoding(codec, spec) or not _fits(codec, of_layer, whole.tensors):
            of_all = _Estimates(of_layer, useful)
            _check_dense(codec, of_layer, useful, of_all)
            tensors = encode(codec, of_layer, of_all)
            error = relative_error(codec, of_layer, tensors, of_all)
            whole = Source(wanted.shard, tensors, codec, spec.seed, spec.signed)
        return rename(_cut_out(codec, plain, whole)), error
    estimates = _Estimates(plain, useful)
    _check_dense(codec, plain, useful, estimates)
    tensors = encode(codec, plain, estimates)
    return rename(tensors), relative_error(codec, plain, tensors, estimates)


def _check_dense(codec: Codec, spec: StateSpec, sources: Sequence[Source], rows: Rows) -> None:
    """`check_finite` of torch's own states; what is compressed has spread it already."""
    if any(source.codec is None for source in sources):
        check_finite(codec, spec, rows)


def _is_shared(codec: Codec | None, shard: Shard) -> bool:
    """Whether ranks share a state in such shards, of which its parts can be put together."""
    if codec is None or codec.momentum or shard.cut is None:
        return False
    return codec.sharing(shard.global_shape, shard.cut) is not None


def _joined(spec: StateSpec, sources: Sequence[Source]) -> Sequence[Source]:
    """The sources; or where they are shards of one state that ranks share, this state as one source."""
    first = next((source for source in sources if math.prod(source.shard.local_shape)), None)
    if first is None or first.codec is None or not all(_is_shared(source.codec, source.shard) for source in sources):
        return sources
    codec, scale_key = first.codec, key_of(spec.name, "scale")
    whole = replace(spec, shard=Shard.whole(spec.shard.global_shape), seed=first.seed, signed=first.signed, fill=0.0)
    alike = all(s.same_encoding(codec, whole) and s.tensors[scale_key] == first.tensors[scale_key] for s in sources)
    if not alike:
        return sources
    check_coverage(whole, [source.shard for source in sources])
    _check_shapes(whole, sources)
    joined = {suffix: value.to("cpu") for suffix, value in codec.allocate(whole).items()}
    for source in sources:
        held = {suffix: source.tensors.get(key_of(spec.name, suffix)) for suffix in joined.keys() - {"scale"}}
        tensors = {suffix: _in_memory(x) for suffix, x in held.items() if x is not None}  # a row has fewer dimensions
        codec.to_whole(source.shard, tensors, joined)
    joined["scale"] = first.tensors[scale_key]
    tensors = {key_of(spec.name, suffix): value for suffix, value in joined.items()}
    return [Source(whole.shard, tensors, codec, first.seed, first.signed)]


def _cut_out(codec: Codec, spec: StateSpec, whole: Source) -> dict[str, Any]:
    """What a shard holds of a state of the whole layer that ranks share."""
    axes = codec.axes(max(1, len(spec.shard.global_shape)))
    tensors = {suffix: _in_memory(whole.tensors[key_of(spec.name, suffix)]) for suffix in axes}
    found = {
        key_of(spec.name, suffix): _copy(x, spec.device) for suffix, x in codec.from_whole(spec.shard, tensors).items()
    }
    scale_key = key_of(spec.name, "scale")
    return {key: value.contiguous() for key, value in found.items()} | {scale_key: whole.tensors[scale_key].clone()}


def check_coverage(spec: StateSpec, shards: Sequence[Shard]) -> None:
    """Every element of the spec's shard must be in exactly one of the others.

    Raises:
        ValueError: naming layer and state.
    """
    wanted = spec.shard.local_rows * spec.shard.row_numel
    found = 0
    for shard in shards:
        overlap = _overlap(shard, spec.shard)
        if overlap is not None:
            rows, columns = overlap
            found += (rows.stop - rows.start) * (columns.stop - columns.start)
    if found != wanted:
        raise ValueError(
            f"{spec.name} of {spec.fqn}: the checkpoint's parts hold {found} of the {wanted} elements wanted here; "
            "ranks' files are missing, or of different checkpoints"
        )


def _check_shapes(spec: StateSpec, sources: Sequence[Source]) -> None:
    for source in sources:
        expected = replace(spec, shard=source.shard, seed=source.seed, signed=source.signed)
        if source.codec is None:
            held = source.tensors[spec.name]
            fits = held.shape.numel() == math.prod(expected.local_shape)
            fits &= isinstance(held, Tensor) or held.shape == expected.local_shape
        else:
            fits = _fits(source.codec, expected, source.tensors, any_dtype=True)
        if not fits:
            found = {key: list(value.shape) for key, value in source.tensors.items() if hasattr(value, "shape")}
            raise ValueError(f"{spec.name} of {spec.fqn}: {found} is not what {source.codec or 'torch'} keeps of it")


class _Estimates:
    """Rows of the new shard, put together from the old ones' estimates."""

    def __init__(self, spec: StateSpec, sources: Sequence[Source]) -> None:
        self.spec = spec
        self.parts: list[tuple[Shard, Rows]] = []
        for source in sources:
            dense = source.tensors.get(spec.name)  # whatever keeps a number per element keeps it under the state's name
            if isinstance(dense, LazyTensor):
                self.parts.append((source.shard, _lazy_rows(dense)))
            elif source.codec is None:
                self.parts.append((source.shard, rows_of(source.tensors[spec.name], source.shard)))
            else:
                tensors = {key: _in_memory(value) for key, value in source.tensors.items()}
                device = _device(tensors, spec.device)
                old = replace(spec, shard=source.shard, device=device, seed=source.seed, signed=source.signed)
                self.parts.append((source.shard, source.codec.bind(old, tensors).estimate))

    def __call__(self, block: Block) -> Tensor:
        shard = self.spec.shard
        assert isinstance(block.index, slice)
        found = torch.empty(block.size, shard.row_numel, dtype=self.spec.dtype, device=self.spec.device)
        wanted = replace(shard, row_offset=shard.row_offset + block.index.start, local_rows=block.size, even_rows=None)
        for old, rows in self.parts:
            overlap = _overlap(old, wanted)
            if overlap is None:
                continue
            ids, columns = overlap  # global rows and columns
            own = slice(columns.start - shard.column_offset, columns.stop - shard.column_offset)
            theirs = slice(columns.start - old.column_offset, columns.stop - old.column_offset)
            at_once = max(1, BLOCK_NUMEL // old.row_numel)  # the old rows may be longer
            for first in range(ids.start, ids.stop, at_once):
                count = min(at_once, ids.stop - first)
                here = slice(first - old.row_offset, first - old.row_offset + count)
                values = rows(Block(old, here, slice(0, count)))
                values = values.expand(count, *old.row_shape).reshape(-1, old.row_numel)
                start = first - wanted.row_offset
                found[start : start + count, own] = values[:, theirs].to(found)
        return found.view(block.size, *shard.row_shape)


def _lazy_rows(dense: LazyTensor) -> Rows:
    def rows(block: Block) -> Tensor:
        assert isinstance(block.index, slice)
        return dense.narrow(0, block.index.start, block.size).read()

    return rows


def _overlap(a: Shard, b: Shard) -> tuple[slice, slice] | None:
    """Global rows and columns that two shards of one layer share."""
    rows = slice(max(a.row_offset, b.row_offset), min(a.row_offset + a.local_rows, b.row_offset + b.local_rows))
    columns = slice(
        max(a.column_offset, b.column_offset),
        min(a.column_offset + a.row_numel, b.column_offset + b.row_numel),
    )
    return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def _same_rows(codec: Codec, source: Source, spec: StateSpec) -> bool:
    """Whether an old sketch differs in columns only."""
    old, new = ((x.row_offset, x.local_rows, x.table_rows) for x in (source.shard, spec.shard))
    return source.same_encoding(codec, spec) and old == new


def _join_columns(codec: Codec, spec: StateSpec, sources: Sequence[Source]) -> dict[str, Any]:
    """A sketch is linear and column by column: cut and join the tables."""
    key, scale_key = key_of(spec.name, "table"), key_of(spec.name, "scale")
    fresh = codec.allocate(spec)
    table = fresh["table"]
    flat = table.view(*table.shape[:2], math.prod(table.shape[2:]))
    scale = sources[0].tensors[scale_key].item() if sources else 1.0
    for source in sources:
        overlap = _overlap(source.shard, spec.shard)
        assert overlap is not None
        columns, old, own = overlap[1], source.shard.column_offset, spec.shard.column_offset
        values = _in_memory(source.tensors[key]).flatten(2)[..., columns.start - old : columns.stop - old]
        part = flat[..., columns.start - own : columns.stop - own]
        part.copy_(values).mul_(source.tensors[scale_key].item() / scale)
    return {key: table, scale_key: scale_tensor(scale)}


def _fits(codec: Codec, spec: StateSpec, tensors: Mapping[str, Any], any_dtype: bool = False) -> bool:
    """Whether tensors are what a codec would allocate."""
    meta = replace(spec, device=torch.device("meta"))
    expected = {key_of(spec.name, suffix): value for suffix, value in codec.allocate(meta).items()}
    return expected.keys() == tensors.keys() and all(
        tensors[key].shape == value.shape and (any_dtype or tensors[key].dtype == value.dtype)
        for key, value in expected.items()
        if isinstance(value, Tensor)
    )


def _in_memory(value: Any) -> Any:
    return value.read() if isinstance(value, LazyTensor) else value


def _copy(value: Any, device: torch.device) -> Any:
    if isinstance(value, LazyTensor):
        return value.read(device)
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _device(tensors: Mapping[str, Any], default: torch.device) -> torch.device:
    return next((value.device for value in tensors.values() if isinstance(value, Tensor)), default)


def dense_of(spec: StateSpec, sources: Sequence[Source]) -> Tensor:
    """The dense state of the spec's shard, ``[local_rows, *row_shape]`` in the parameter's dtype."""
    dense = torch.empty(spec.local_shape, dtype=spec.param_dtype, device=spec.device)
    fill_dense(spec, sources, dense)
    return dense


def fill_dense(spec: StateSpec, sources: Sequence[Source], dense: Tensor) -> None:
    """Write the dense state of the spec's shard.

    Args:
        sources: parts that cover the shard; more is welcome.
        dense: where to, ``[local_rows, *row_shape]`` (modified in place).

    Raises:
        ValueError: an element is in no source, or in two.
    """
    plain = replace(spec, name=spec.name.rpartition(".")[2])
    useful = [source for source in _joined(plain, sources) if _overlap(source.shard, spec.shard) is not None]
    check_coverage(spec, [source.shard for source in useful])
    _check_shapes(plain, useful)
    estimates = _Estimates(plain, useful)
    for block in spec.shard.blocks():
        dense[block.index] = estimates(block).to(dense.dtype)
