"""The states of a layer that its optimizer's own step updates: decoded for that step, and encoded after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import check_finite, decode, encode, relative_error
from lightning_sketch.layers.dtensor_states import dense_like, held_rows, sharded_like, tensor_axes
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.step_count import read_step, step_tensor
from lightning_sketch.sharding import is_dtensor, local, shard_of


@torch.no_grad()
def decode_entry(part: LayerPart, param: Tensor, group: Mapping[str, Any], entry: dict[str, Any]) -> None:
    """Make all states of an entry of ``optimizer.state`` dense, as its optimizer keeps them (modified in place).

    States that are dense already, such as a user assigned, stay.

    Args:
        param: the parameter, or a meta tensor of its shape and dtype.
    """
    for name, codec in part.layer.codecs.items():
        if not _is_stored(part, name, param, entry):
            continue
        keys = part.layout(param)[name]
        stored = {key: entry.pop(key) for key in keys}
        if codec.exact:
            held = stored[name].view(local(param).shape)
        else:
            device = next(tensor.device for tensor in stored.values() if tensor.ndim) if param.is_meta else param.device
            spec = dataclasses.replace(part.spec(name, param, group), device=device)
            held = decode(codec, spec, stored).view(local(param).shape)
            if not local(param).is_contiguous():  # channels_last: kernels walk both memories side by side
                held = torch.empty_like(local(param)).copy_(held)
        entry[name] = dense_like(param, held)
    stock_entry(part.layer, entry)


@torch.no_grad()
def encode_entry(part: LayerPart, param: Tensor, group: Mapping[str, Any], entry: dict[str, Any], step: float) -> None:
    """Encode all dense states of an entry (modified in place).

    Args:
        step: number of the step that they are of.
    """
    for name, codec in part.layer.codecs.items():
        dense: Any = entry.get(name)
        if not _is_dense(dense, param) or (not is_dtensor(dense) and _is_stored(part, name, param, entry)):
            continue
        held = held_rows(dense, part.shard)
        if codec.exact:
            entry[name] = held
            continue
        del entry[name], dense
        entry |= encode(codec, part.spec(name, param, group), held, step=int(step))
    if part.layer.stock_count == "none":
        entry["step"] = step_tensor(step)


def stock_entry(layer: LayerRecord, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry whose step count is as its optimizer keeps it (modified in place)."""
    if layer.stock_count == "none":
        entry.pop("step", None)
    elif layer.stock_count == "number" and isinstance(entry.get("step"), Tensor):
        entry["step"] = int(entry["step"])
    return entry


def unnested(layer: LayerRecord, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A saved entry with the layer's states beside everything else: bitsandbytes' ``state_dict`` puts some in another.

    >>> from lightning_sketch import BFloat16
    >>> layer = LayerRecord("table", 0, (2, 2), {"state1": True}, {"state1": BFloat16()}, stock_count="tensor")
    >>> unnested(layer, {"step": 1, "wrapped": {"state1": 3}, "own": {}})
    {'step': 1, 'own': {}, 'state1': 3}
    """
    ours = {*layer.codecs, *tensor_axes(layer)}
    nested = {key: value for key, value in entry.items() if isinstance(value, Mapping) and not ours.isdisjoint(value)}
    found = {key: value for key, value in entry.items() if key not in nested}
    return found | {key: value for states in nested.values() for key, value in states.items()}


def stored_step(entry: Mapping[str, Any]) -> float:
    """How many steps an entry has made, as far as it says."""
    try:
        return read_step(entry.get("step", 0.0), "")
    except ValueError:  # the optimizer means something else by it
        return 0.0


def encoded_from(
    layer: LayerRecord, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    """A whole entry from a dense one; the relative error of every state. `state` is not changed.

    Args:
        state: dense states, of a DTensor parameter DTensors or whole tensors; and whatever else its optimizer keeps.

    Raises:
        ValueError: a state holds NaN or inf; see `check_finite`.
    """
    part = LayerPart(layer, shard_of(param, layer.fqn))
    placed = {key: sharded_like(param, x) if is_dtensor(param) else x for key, x in state.items()}
    entry = {key: _copied(value, param) for key, value in placed.items()}
    dense = {name: entry[name] for name in layer.codecs if _is_dense(entry.get(name), param)}
    with torch.no_grad():
        for name, value in dense.items():
            check_finite(layer.codecs[name], part.spec(name, param, group), held_rows(value, part.shard))
        encode_entry(part, param, group, entry, max(1.0, stored_step(state)))
        errors = {
            name: relative_error(layer.codecs[name], part.spec(name, param, group), entry, held_rows(value, part.shard))
            for name, value in dense.items()
        }
    return entry, errors


def _copied(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(param.device, copy=True) if value.ndim else value.clone()


def _is_dense(value: Any, param: Tensor) -> bool:
    """Whether a state is as `StateDef` says: shaped like the parameter, in its dtype, and placed as it is."""
    fits = isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point()
    return fits and value.layout is torch.strided and is_dtensor(value) == is_dtensor(param)


def _is_stored(part: LayerPart, name: str, param: Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether a state is as its codec stores it."""
    layout = part.layout(param)[name]
    if name in entry and name not in layout:
        return False
    return all(
        isinstance(found := entry.get(key), Tensor)
        and not is_dtensor(found)
        and found.shape == expected.shape
        and found.dtype == expected.dtype
        for key, expected in layout.items()
    )
