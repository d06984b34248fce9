"""Between torch's dense states and compressed ones, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import Encoding, allocate, check_finite, decode, relative_error
from lightning_sketch.layers.dtensor_states import (
    SHARDS,
    dense_like,
    held_rows,
    of_others,
    sources,
    step_mismatch,
    tensor_axes,
)
from lightning_sketch.layers.encode_together import encode_together
from lightning_sketch.layers.record import RECORDS, LayerPart, LayerRecord
from lightning_sketch.layers.reshard import dense_of
from lightning_sketch.layers.shared import SharedLayer
from lightning_sketch.layers.step_count import read_step, step_tensor
from lightning_sketch.layers.stock_states import decode_entry, encoded_from, stock_entry
from lightning_sketch.sharding import Shard, is_dtensor, local, shard_of
from lightning_sketch.sharding.agree import place, raise_together
from lightning_sketch.sharding.dtensor import ranks_of
from lightning_sketch.sharding.fake import is_fake


def fresh_state(layer: LayerRecord, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The ``optimizer.state[param]`` of a compressed layer before its first step."""
    part = LayerPart(layer, shard_of(param, layer.fqn))
    return {"step": step_tensor()} | part.allocate(param, group)


def encode_layer(
    layer: LayerRecord, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Encode a layer's dense states.

    Args:
        state: torch's ``optimizer.state[param]``; of a DTensor parameter, DTensors or whole tensors.

    Returns:
        the compressed ``optimizer.state[param]``, and the relative error of every state (1.0 for a dropped one); of a
        sharded layer, of the part that is held here; NaN under ``FakeTensorMode``.
    """
    if layer.stock_count is not None:
        return encoded_from(layer, param, group, state)
    # SGD keeps no step count; its buffer exists, so at least one step was made.
    tensors: dict[str, Any] = {"step": step_tensor(read_step(state.get("step", 1.0), layer.fqn))}
    part = LayerPart(layer, shard_of(param, layer.fqn))
    encoded, errors = encode_part(
        part, param, group, {name: held_rows(state[name], part.shard) for name in layer.codecs}
    )
    return tensors | encoded, errors


def encode_part(
    part: LayerPart, param: Tensor, group: Mapping[str, Any], dense: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Encode dense states of a layer's part, each ``[local_rows, *row_shape]``; as `encode_layer`, without step.

    Collective over the ranks that share states of a DTensor.
    """
    shared = part.shared if any(name in part.sharing for name in dense) else ()
    ranks = ranks_of(param, part.layer.fqn) if shared else ()
    (found,) = encode_parts([part], param, group, [dense], shared, ranks)
    return found


def not_finite(
    parts: Sequence[LayerPart], param: Tensor, group: Mapping[str, Any], dense: Sequence[Mapping[str, Tensor]]
) -> ValueError | None:
    """The first error of `check_finite` about dense states of the parts of layers in a tensor."""
    for part, states in zip(parts, dense, strict=True):
        for name, held in states.items():
            try:
                check_finite(part.layer.codecs[name], part.spec(name, param, group), held)
            except ValueError as error:
                return error
    return None


@torch.no_grad()  # a state that a user computed from parameters may ask for gradients
def encode_parts(
    parts: Sequence[LayerPart],
    param: Tensor,
    group: Mapping[str, Any],
    dense: Sequence[Mapping[str, Tensor]],
    shared: Sequence[SharedLayer],
    ranks: Sequence[Any],
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Encode dense states of all parts of layers in a tensor; of each as `encode_part`. Collective if `shared`.

    Args:
        shared: the layers in the tensor or its counterparts whose states ranks share.
        ranks: their process groups; see `reduce_together`.

    Raises:
        ValueError: a state holds NaN or inf, here or on a rank that shares it; see `check_finite`.
    """
    places = place(ranks, local(param).device) if shared and not is_fake(param) else {}
    raise_together(not_finite(parts, param, group, dense), places, ", ".join(layer.fqn for layer in shared))
    found: list[tuple[dict[str, Any], dict[str, float]]] = []
    encodings: list[dict[str, Encoding]] = []
    for part, states in zip(parts, dense, strict=True):
        tensors: dict[str, Any] = {}
        errors: dict[str, float] = {}
        of_part: dict[str, Encoding] = {}
        for name, given in states.items():
            codec, held = part.layer.codecs[name], given.to(param.device)
            if is_fake(held):
                tensors |= {} if codec.drops else allocate(codec, part.spec(name, param, group))
                errors[name] = math.nan
            elif codec.drops:
                errors[name] = 1.0 if bool((held != 0).any()) else 0.0
            else:
                of_part[name] = Encoding(codec, part.spec(name, param, group), held)
        found.append((tensors, errors))
        encodings.append(of_part)
    if shared and not is_fake(param):
        encode_together(shared, list(zip(parts, encodings, strict=True)), param, group, ranks)
    for (tensors, errors), of_part, states in zip(found, encodings, dense, strict=True):
        for name, encoding in of_part.items():
            tensors |= encoding.finish()
            held = states[name].to(param.device)
            errors[name] = relative_error(encoding.codec, encoding.spec, tensors, held)
    return found


def decode_layer(
    layer: LayerRecord, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    """A layer's dense states as torch keeps them; a dropped first moment is zero.

    Args:
        param: the parameter, or a meta tensor of its shape and dtype.
        state: the compressed ``optimizer.state[param]``.
    """
    if not state:
        return _untrained(layer, param, group)
    part = LayerPart(layer, shard_of(param, layer.fqn))
    if layer.stock_count is not None:
        entry = dict(state)
        decode_entry(part, param, group, entry)
        return entry
    device = next((state[key].device for key in tensor_axes(layer) if key in state), torch.device("cpu"))
    dense: dict[str, Any] = {}
    for name, codec in layer.codecs.items():
        # With the parameter's strides (channels_last): torch's fused kernels walk their memory side by side.
        held = torch.zeros_like(local(param), device=device)
        if not codec.drops:
            spec = dataclasses.replace(part.spec(name, param, group), device=device)
            held.copy_(decode(codec, spec, dict(state)).view(held.shape))
        dense[name] = dense_like(param, held)
    return _with_step(layer, param, group, state) | dense


def decode_flat(
    parts: Sequence[LayerPart], tensor: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The dense states of a flat tensor of DeepSpeed; padding and dropped first moments are zero.

    Args:
        parts: all that our rules step in `tensor`.
        state: its ``optimizer.state[tensor]``.
    """
    dense = {name: torch.zeros_like(tensor) for name in parts[0].layer.codecs}
    for part in parts:
        for name, codec in part.layer.codecs.items():
            if not codec.drops:
                part.rows(dense[name]).copy_(decode(codec, part.spec(name, tensor, group), dict(state)))
    return _with_step(parts[0].layer, tensor, group, state) | dense


def decompress_state_dict(state_dict: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Turn a compressed optimizer's state dict into one that the plain torch optimizer loads.

    Args:
        state_dict: from a converted optimizer. If its parameters were sharded (FSDP2), gathered: without DTensors.
        dtype: dtype of the parameters, in which torch keeps its states.

    Returns:
        a new state dict; kept layers are shared with the given one.

    Raises:
        ValueError: nothing in it is compressed, it holds DTensors, or its format version is not known.
    """
    state = dict(state_dict["state"])
    groups = [dict(group) for group in state_dict["param_groups"]]
    if not any(RECORDS in group for group in groups):
        raise ValueError("this state dict holds no compressed states; the plain optimizer can load it as it is")
    for group in groups:
        for key, record in zip(group["params"], group.pop(RECORDS), strict=True):
            if record is None:
                continue
            layer = LayerRecord.from_record(record)
            param = torch.empty(layer.shape, dtype=dtype, device="meta")
            if dense := gathered_to_dense(layer, param, group, state.get(key, {})):
                state[key] = dense
    return {**state_dict, "state": state, "param_groups": groups}


def gathered_to_dense(
    layer: LayerRecord, param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """A layer's dense states from its entry of a checkpoint, whether it was sharded or not.

    Args:
        param: a meta tensor of the layer's shape and dtype.

    Raises:
        ValueError: the entry holds DTensors, or its shards are of different steps.
    """
    if any(isinstance(value, Tensor) and is_dtensor(value) for value in saved.values()):
        raise ValueError(f"{layer.fqn} holds DTensors: gather the state dict first (full_state_dict=True)")
    if problem := step_mismatch(saved):
        raise ValueError(f"{layer.fqn}: {problem}")
    if SHARDS not in saved:
        return decode_layer(layer, param, group, saved)
    part = LayerPart(layer, Shard.whole(layer.shape))
    dense: dict[str, Any] = {}
    for name, codec in layer.codecs.items():
        spec = dataclasses.replace(part.spec(name, param, group), device=torch.device("cpu"))
        if codec.drops:
            dense[name] = torch.zeros(layer.shape, dtype=param.dtype, device="cpu")
        elif layer.stock_count is None or any(key in saved for key in part.layout(param)[name]):
            dense[name] = dense_of(spec, list(sources(layer, name, codec, saved, part.shard))).view(layer.shape)
    if layer.stock_count is not None:
        return stock_entry(layer, of_others(layer, saved)) | dense
    return _with_step(layer, param, group, saved) | dense


def _with_step(layer: LayerRecord, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The step count as torch's optimizer of these states keeps it."""
    if "momentum_buffer" in layer.codecs and len(layer.codecs) == 1:
        return {}  # SGD counts no steps
    step = read_step(state["step"], layer.fqn)
    if "exp_avg" in layer.codecs and "weight_decay" not in group:
        return {"step": int(step)}  # SparseAdam counts in a Python int
    on_device = bool(group.get("fused") or group.get("capturable"))
    return {"step": step_tensor(step, param.device if on_device and not param.is_meta else "cpu")}


def _untrained(layer: LayerRecord, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """What torch allocates before the first step: nothing, except for Adagrad, which needs its sum from the start."""
    if "sum" not in layer.codecs:
        return {}
    device = torch.device("cpu") if param.is_meta else param.device
    held = torch.full(local(param).shape, float(group["initial_accumulator_value"]), dtype=param.dtype, device=device)
    step = step_tensor(device=device if group.get("fused") else "cpu")
    return {"step": step, "sum": dense_like(param, held)}
