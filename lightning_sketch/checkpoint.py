"""Optimizer checkpoints: compressed to compressed, dense to compressed, compressed to dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sketch.codecs import Drop, decode, encode, relative_error
from lightning_sketch.layer import FORMAT_VERSION, RECORDS, Layer

if TYPE_CHECKING:
    from lightning_sketch.optimizer import CompressedOptimizer


def prepare_load(
    optimizer: CompressedOptimizer, state_dict: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[Tensor, dict[str, Any]]]]:
    """Check a checkpoint against the live optimizer and split it; changes nothing but the report of encoding errors.

    Args:
        optimizer: the optimizer that will load.
        state_dict: from `CompressedOptimizer.state_dict` or from the uncompressed optimizer's.

    Returns:
        the part that torch loads, and ``(param, optimizer.state[param])`` for every compressed layer.

    Raises:
        ValueError: the checkpoint does not fit; the message names every layer and the reason.
    """
    saved_groups = state_dict["param_groups"]
    live_groups = optimizer.param_groups
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in live_groups]:
        raise ValueError(
            f"the checkpoint has parameter groups of {[len(g['params']) for g in saved_groups]} parameters, "
            f"the optimizer of {[len(g['params']) for g in live_groups]}"
        )
    problems: list[str] = []
    restored: list[tuple[Tensor, dict[str, Any]]] = []
    stock_state = dict(state_dict["state"])
    errors: dict[str, dict[str, float]] = {}
    for saved, live in zip(saved_groups, live_groups, strict=True):
        records = saved.get(RECORDS) or [None] * len(saved["params"])
        for key, record, live_record, param in zip(
            saved["params"], records, optimizer._records(live), live["params"], strict=True
        ):
            state = stock_state.get(key)
            if live_record is None:
                if record is not None:
                    problems.append(f"{record.get('fqn')}: compressed in the checkpoint, kept by the policy")
                continue
            layer = optimizer._layer(live_record)
            if record is not None:
                problem = _mismatch(record, live_record) or _damage(layer, param, live, state)
            else:
                problem = _not_dense(layer, param, state)
            if problem:
                problems.append(f"{layer.fqn}: {problem}")
            if problem or not state:
                continue
            if record is not None:
                tensors = _on_device(state, param.device)
            else:
                tensors, errors[layer.fqn] = encode_layer(layer, param, live, state)
            restored.append((param, tensors))
            stock_state[key] = {"step": tensors["step"]}  # torch's __setstate__ wants one
    if problems:
        raise ValueError(
            "this checkpoint does not fit the compressed optimizer; nothing was changed.\n  "
            + "\n  ".join(problems)
            + "\nLoad it with the policy and seed it was written under, or make it dense first with "
            "lightning_sketch.decompress_state_dict(state_dict)."
        )
    optimizer._compression.errors.update(errors)
    groups = [
        {**saved, RECORDS: live[RECORDS]} for saved, live in zip(saved_groups, live_groups, strict=True)
    ]  # the live policy stays: a dense checkpoint must not switch compression off
    return {**state_dict, "state": stock_state, "param_groups": groups}, restored


def encode_layer(
    layer: Layer, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Encode a layer's dense states.

    Args:
        state: torch's ``optimizer.state[param]``.

    Returns:
        the compressed ``optimizer.state[param]``, and the relative error of every state (1.0 for a dropped one).
    """
    # SGD keeps no step count; its buffer exists, so at least one step was made.
    tensors: dict[str, Any] = {"step": torch.tensor(float(state.get("step", 1.0)))}
    errors: dict[str, float] = {}
    for name, codec in layer.codecs.items():
        dense = state[name].to(param.device)
        if isinstance(codec, Drop):
            errors[name] = 1.0 if bool((dense != 0).any()) else 0.0
            continue
        spec = layer.spec(name, param, group)
        tensors |= encode(codec, spec, dense)
        errors[name] = relative_error(codec, spec, tensors, dense)
    return tensors, errors


def decode_layer(layer: Layer, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's dense states as torch keeps them; a dropped first moment is zero.

    Args:
        param: the parameter, or a meta tensor of its shape and dtype.
        state: the compressed ``optimizer.state[param]``.
    """
    if not state:
        return _fresh(layer, param, group)
    device = next((v.device for k, v in state.items() if isinstance(v, Tensor) and k != "step"), torch.device("cpu"))
    dense: dict[str, Any] = {}
    for name, codec in layer.codecs.items():
        spec = dataclasses.replace(layer.spec(name, param, group), device=device)
        dense[name] = torch.zeros_like(param, device=device)
        if not isinstance(codec, Drop):
            # With the parameter's strides (channels_last): torch's fused kernels walk their memory side by side.
            dense[name].copy_(decode(codec, spec, dict(state)).view(param.shape))
    if "momentum_buffer" in layer.codecs and len(layer.codecs) == 1:
        return dense  # SGD counts no steps
    if "exp_avg" in layer.codecs and "weight_decay" not in group:
        return {"step": int(state["step"])} | dense  # SparseAdam counts in a Python int
    on_device = bool(group.get("fused") or group.get("capturable"))
    return {"step": state["step"].to(param.device if on_device and not param.is_meta else "cpu", copy=True)} | dense


def decompress_state_dict(state_dict: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Turn a compressed optimizer's state dict into one that the plain torch optimizer loads.

    Args:
        state_dict: from a converted optimizer.
        dtype: dtype of the parameters, in which torch keeps its states.

    Returns:
        a new state dict; kept layers are shared with the given one.

    Raises:
        ValueError: nothing in it is compressed, or its format version is not known.
    """
    state = dict(state_dict["state"])
    groups = [dict(group) for group in state_dict["param_groups"]]
    if not any(RECORDS in group for group in groups):
        raise ValueError("this state dict holds no compressed states; the plain optimizer can load it as it is")
    for group in groups:
        for key, record in zip(group["params"], group.pop(RECORDS), strict=True):
            if record is None:
                continue
            if record["version"] != FORMAT_VERSION:
                raise ValueError(f"{record['fqn']}: format version {record['version']}, this is {FORMAT_VERSION}")
            layer = Layer.from_record(record)
            param = torch.empty(layer.shape, dtype=dtype, device="meta")
            if dense := decode_layer(layer, param, group, state.get(key, {})):
                state[key] = dense
    return {**state_dict, "state": state, "param_groups": groups}


def _fresh(layer: Layer, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """What torch allocates before the first step: nothing, except for Adagrad, which needs its sum from the start."""
    if "sum" not in layer.codecs:
        return {}
    device = torch.device("cpu") if param.is_meta else param.device
    total = torch.full(layer.shape, float(group["initial_accumulator_value"]), dtype=param.dtype, device=device)
    return {"step": torch.zeros((), device=device if group.get("fused") else "cpu"), "sum": total}


def _mismatch(saved: Mapping[str, Any], live: Mapping[str, Any]) -> str | None:
    """Why a saved layer record does not fit the live one."""
    if saved.get("version") != live["version"]:
        return f"written by format version {saved.get('version')}, this is {live['version']}"
    for field, word in (("shape", "shape"), ("codecs", "codecs"), ("seed", "hash seed"), ("signed", "states")):
        if saved.get(field) != live[field]:
            return f"its {word} in the checkpoint is {saved.get(field)}, here {live[field]}"
    return None


def _damage(layer: Layer, param: Tensor, group: Mapping[str, Any], state: Any) -> str | None:
    """What is missing from, or wrong with, a saved compressed state."""
    if not state:
        return None
    expected = layer.allocate(torch.empty_like(param, device="meta"), group)
    if set(state) != set(expected):
        return f"holds {sorted(map(str, state))}, expected {sorted(expected)}"
    for key, value in expected.items():
        if isinstance(value, Tensor):
            found = state[key]
            if not isinstance(found, Tensor) or found.shape != value.shape or found.dtype != value.dtype:
                return f"{key} is {_describe(found)}, expected {_describe(value)}"
        elif not isinstance(state[key], float):
            return f"{key} is {_describe(state[key])}, expected a number"
    return None


def _not_dense(layer: Layer, param: Tensor, state: Any) -> str | None:
    """Why a saved uncompressed state cannot be encoded."""
    if not state:
        return None
    for name in layer.codecs:
        if not isinstance(state.get(name), Tensor):
            return f"has no {name} in the checkpoint (it holds {sorted(map(str, state))})"
        if state[name].shape != param.shape:
            return f"{name} has shape {list(state[name].shape)} in the checkpoint, the parameter {list(param.shape)}"
    return None


def _on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    # Copies: the checkpoint stays the caller's. `step` lives on the CPU, where reading it costs nothing.
    return {
        k: v.to("cpu" if k == "step" else device, copy=True) if isinstance(v, Tensor) else v for k, v in state.items()
    }


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
