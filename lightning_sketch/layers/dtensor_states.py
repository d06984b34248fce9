"""States of DTensor parameters in a checkpoint: DTensors too, so that torch.distributed.checkpoint knows whose is what.

A tensor that runs along the sharded dimension is sharded like the parameter. Any other is the same on every rank where
ranks agree on it in every step, and else a different one on each, which becomes a slice of a stack ``[shards, ...]``.
(Plain tensors would be taken for replicas: one rank's would be saved for all.) How many shards there were stands beside
them, so that another number can be resharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import Codec, key_of, scale_tensor
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.reshard import Source
from lightning_sketch.sharding import Shard, is_dtensor, local
from lightning_sketch.sharding.dtensor import even_shard, sharding_of

#: Beside the states of a sharded layer in a checkpoint: the number of shards, and the dimension they are cut along.
SHARDS, SHARD_DIM = "shards", "shard_dim"
#: Beside them where there are stacks: the step that each shard's states are of. Every rank writes its own, so that the
#: files of two saves, side by side in a directory that was overwritten in part, are not taken for one checkpoint.
SHARD_STEPS = "shard_steps"


def wrap(part: LayerPart, param: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """``optimizer.state[param]`` of a DTensor as it goes into a checkpoint. Shares memory with the state."""
    shards, dim = sharding_of(param, part.layer.fqn)
    if not is_dtensor(param) or shards == 1:
        return dict(state)
    axes, same = tensor_axes(part.layer), replicated(part)
    wrapped: dict[str, Any] = {SHARDS: shards, SHARD_DIM: dim}
    ours = state
    if part.layer.stock_count is not None:  # what else its optimizer keeps there is its own affair
        ours = {key: value for key, value in state.items() if key in axes}
        wrapped |= {key: value for key, value in state.items() if key not in axes}
    if any(key != "step" and dim not in axes.get(key, ()) for key in ours):
        # Not in a layer without stacks: torch can load that into another number of shards.
        step = torch.tensor(float(state["step"]), dtype=torch.float64, device=param.device)
        wrapped[SHARD_STEPS] = _wrap(step, (), param, shards, dim)
    for key, value in ours.items():
        if key not in axes and key != "step":
            # Ranks may differ (one without rows, one whose layout agreed when it loaded), and any could be asked.
            value = torch.as_tensor(value, dtype=torch.float64, device=param.device)
        wrapped[key] = value if key == "step" else _wrap(value, axes.get(key, ()), param, shards, dim, key in same)
    return wrapped


def replicated(part: LayerPart) -> set[str]:
    """Keys of a layer's tensors that are the same on every rank, because ranks agree on what is added to them."""
    ndim, dim = max(1, len(part.layer.shape)), 0 if part.shard.cut == "rows" else 1
    return {
        key_of(state, suffix)
        for state, sharing in part.sharing.items()
        if not sharing.largest  # after a step these are each rank's own
        for suffix, along in part.layer.codecs[state].axes(ndim).items()
        if dim not in along
    }


def step_mismatch(saved: Mapping[str, Any]) -> str | None:
    """What is wrong with a layer's entry of a checkpoint whose shards are of different steps; ``None`` if they agree.

    Of DTensors each rank sees its own shard's step, and compares it with the one that some rank saved for all.
    """
    step, of_shards = saved.get("step"), saved.get(SHARD_STEPS)
    if step is None or not isinstance(of_shards, Tensor):
        return None
    steps = sorted({float(step), *local(of_shards).tolist()})
    if len(steps) == 1:
        return None
    listed = ", ".join(f"{step:g}" for step in steps)
    return (
        f"its shards are of steps {listed}: the directory was overwritten in part, by a save that ended in the middle; "
        "or it was gathered (full_state_dict=True) from another layout, which lightning_sketch.restore loads"
    )


def dense_like(param: Any, held: Tensor) -> Tensor:
    """A tensor like `param` whose local part is `held`."""
    return _from_local(held, param, list(param.placements), tuple(param.shape)) if is_dtensor(param) else held


def sharded_like(param: Any, value: Any) -> Any:
    """A kept DTensor parameter's state from a gathered checkpoint, cut like the parameter; anything else as it is."""
    if not isinstance(value, Tensor) or is_dtensor(value) or value.shape != param.shape or value.ndim == 0:
        return value
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    # Every rank has the whole and takes its part; nothing is sent. Not by distribute_tensor, which takes the whole to
    # the mesh's device, where offloaded parameters are not.
    sizes, starts = compute_local_shape_and_global_offset(value.shape, param.device_mesh, param.placements)
    held = value[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
    return dense_like(param, held.to(param.device, copy=True))


def held_rows(dense: Tensor, shard: Shard) -> Tensor:
    """The local part of a dense state, ``[local_rows, *row_shape]``."""
    held = local(dense)
    if not is_dtensor(dense) and shard != Shard.whole(shard.global_shape):
        held = dense[shard.row_offset : shard.row_offset + shard.local_rows]
        if shard.part_shape is not None:
            held = held.flatten(1)[:, shard.column_offset : shard.column_offset + shard.row_numel]
            held = held.reshape(shard.local_rows, *shard.row_shape)
    return shard.as_rows(held)


def tensor_axes(layer: LayerRecord) -> dict[str, tuple[int | None, ...]]:
    """For every tensor of a layer, by key, the parameter's dimensions along which its own run; see `Codec.axes`."""
    ndim = max(1, len(layer.shape))
    return {
        key_of(state, suffix): axes
        for state, codec in layer.persistent_codecs().items()
        for suffix, axes in codec.axes(ndim).items()
    }


def unwrap_same(part: LayerPart, param: Any, saved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The states of a checkpoint in which every tensor is sharded as it is here; ``None`` if that is not so."""
    shards, dim = sharding_of(param, part.layer.fqn)
    # flatten_optimizer_state_dict=True loses what is not in optimizer.state; of DTensors the stacks say it, too.
    stated = SHARDS in saved or not any(isinstance(value, Tensor) and is_dtensor(value) for value in saved.values())
    if stated and (saved.get(SHARDS, 1), saved.get(SHARD_DIM, 0)) != (shards, dim):
        return None
    if shards == 1:
        return dict(saved)
    axes, same = tensor_axes(part.layer), replicated(part)
    state: dict[str, Any] = {}
    for key, value in saved.items():
        if key in (SHARDS, SHARD_DIM, SHARD_STEPS):
            continue
        if key in same:
            if not is_dtensor(value) or value.ndim != len(axes[key]):
                return None  # gathered, or a stack, of a version whose ranks did not agree
            state[key] = local(value)
        elif key in axes:
            if not is_dtensor(value) or (dim not in axes[key] and value.shape[0] != shards):
                return None
            held = local(value)
            state[key] = held if dim in axes[key] else held[0]
        else:
            stacked = is_dtensor(value) and part.layer.stock_count is None
            state[key] = local(value)[0] if stacked else value
    return state


def of_others(layer: LayerRecord, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer's own step keeps of a layer beside the states of our codecs; see `LayerRecord.stock_count`."""
    ours = {SHARDS, SHARD_DIM, SHARD_STEPS, *tensor_axes(layer)}
    ours |= {key_of(state, "scale") for state in layer.codecs}
    return {key: value for key, value in saved.items() if key not in ours}


def sources(layer: LayerRecord, state: str, codec: Codec, saved: Mapping[str, Any], live: Shard) -> Iterator[Source]:
    """A state of a checkpoint as the old shards held it. Collective where the checkpoint's tensors are DTensors.

    Args:
        saved: the layer's entry of the checkpoint. Tensors are whole, or DTensors sharded as the live parameter is. Of
            those, stacks and what ranks share, small all of them, are gathered; of others, only what of the old shards
            lies in `live` is given.
        live: the shard that is to be filled.
    """
    shards, dim = int(saved.get(SHARDS, 1)), int(saved.get(SHARD_DIM, 0))
    axes = {key_of(state, suffix): along for suffix, along in codec.axes(max(1, len(layer.shape))).items()}
    # Stacks of what ranks share were written by a version whose ranks did not agree.
    sharing = codec.sharing(layer.shape, "columns" if dim else "rows")
    stacked = any(dim not in along and len(saved[key].shape) > len(along) for key, along in axes.items())
    agreed = sharing is None or sharing.largest or not stacked
    scale_key = key_of(state, "scale")
    values = {key: saved[key] for key in (*axes, scale_key) if key in saved}
    for key, value in values.items():
        if is_dtensor(value) and (sharing is not None or dim not in axes.get(key, ())):
            values[key] = value.full_tensor()
    only_live = any(is_dtensor(values[key]) for key, along in axes.items() if dim in along)
    for index in range(shards):
        old = Shard.whole(layer.shape)
        if shards > 1:
            old = even_shard(layer.shape, dim, shards, index, agree=agreed)
        here = _between(old, live, dim) if only_live else old
        if here is None:
            continue
        tensors: dict[str, Any] = {}
        for key, along in axes.items():
            value = local(values[key])
            if dim not in along:
                tensors[key] = value[index] if len(value.shape) > len(along) else value
            else:
                start, length = _extent(here, dim)
                first = _extent(live, dim)[0] if is_dtensor(values[key]) else 0
                tensors[key] = value.narrow(along.index(dim), start - first, length)
        if scale_key in values:
            scale = values[scale_key]
            scale = scale[index] if isinstance(scale, Tensor) and scale.ndim else scale
            tensors[scale_key] = scale_tensor(scale, f"{scale_key} of {layer.fqn}")
        yield Source(here, tensors, codec, layer.seed, layer.signed[state])


def _extent(shard: Shard, dim: int) -> tuple[int, int]:
    """First index and length of a shard along dimension 0 or 1."""
    if dim == 0:
        return shard.row_offset, shard.local_rows
    return shard.column_offset // max(1, math.prod(shard.row_shape[1:])), shard.row_shape[0]


def _between(old: Shard, live: Shard, dim: int) -> Shard | None:
    """The part of `old` that lies in `live`, both cut along `dim`."""
    (a, n), (b, m) = _extent(old, dim), _extent(live, dim)
    start, stop = max(a, b), min(a + n, b + m)
    if start >= stop:
        return None
    if dim == 0:
        return replace(old, row_offset=start, local_rows=stop - start, even_rows=None)
    inner = old.row_shape[1:]
    offset = start * math.prod(inner)
    return replace(old, part_shape=(stop - start, *inner), column_offset=offset, even_columns=None)


def _wrap(
    value: Tensor, along: tuple[int | None, ...], param: Any, shards: int, dim: int, same: bool = False
) -> Tensor:
    if dim in along:
        axis = along.index(dim)
        shape = list(value.shape)
        shape[axis] = param.shape[dim]
        return _from_local(value, param, _along(param, axis), tuple(shape))
    if same:
        from torch.distributed.tensor import Replicate

        return _from_local(value, param, [Replicate()] * len(param.placements), tuple(value.shape))
    return _from_local(value[None], param, _along(param, 0), (shards, *value.shape))


def _along(param: Any, axis: int) -> list[Any]:
    """The parameter's placements, of a tensor that is cut along `axis`."""
    placements = list(param.placements)
    for i, placement in enumerate(placements):
        if not placement.is_replicate():
            strides = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
            placements[i] = type(placement)(axis, **strides)
    return placements


def _from_local(held: Tensor, param: Any, placements: list[Any], shape: tuple[int, ...]) -> Tensor:
    """A DTensor over the mesh of `param` whose local part is `held`, on the device where it is.

    Not by ``DTensor.from_local``, which moves it to the mesh's device: parameters that FSDP2 offloads are on the CPU.
    """
    from torch.distributed.tensor import DTensor  # here: slow to import, and only DTensor parameters come this way
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    meta = TensorMeta(torch.Size(shape), stride, held.dtype)
    spec = DTensorSpec(param.device_mesh, tuple(placements), tensor_meta=meta)
    return DTensor(held.detach().contiguous(), spec, requires_grad=False)  # type: ignore[no-untyped-call]
