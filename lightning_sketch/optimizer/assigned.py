"""What a user put into ``optimizer.state[param]`` of a compressed layer: dense states, as torch.optim keeps them.

Scripts that reset or edit moments (ReLoRA, pruning, model surgery) write to ``state["exp_avg"]``. That is taken as
`load_state_dict` takes it: a dense state in place of what its codec stores is encoded, and the others stay. Anything
else that the codecs do not store is refused before a step moves anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import key_of, scale_tensor
from lightning_sketch.layers.dtensor_states import held_rows
from lightning_sketch.layers.record import LayerPart
from lightning_sketch.layers.shared import SharedLayer
from lightning_sketch.layers.step_count import read_step, step_tensor
from lightning_sketch.layers.transcode import encode_parts
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.optimizer.lossy import warn_of_lossy
from lightning_sketch.optimizer.on_device import stay_on_device
from lightning_sketch.sharding import is_dtensor
from lightning_sketch.sharding.fake import is_fake


@dataclass
class Encoded:
    """What replaces assigned states in ``optimizer.state[param]``.

    Args:
        state: ``optimizer.state[param]``.
        tensors: new entries.
        dense: keys of the dense states.
        errors: relative error of every state that was encoded, by layer and state.
    """

    state: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)
    dense: set[str] = field(default_factory=set)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def commit(optimizer: CompressedGroups, found: Iterable[Encoded]) -> None:
    """Put what was encoded in place."""
    errors: dict[str, dict[str, float]] = {}
    for encoded in found:
        for key in encoded.dense:
            del encoded.state[key]
        encoded.state.update(encoded.tensors)
        errors |= encoded.errors
    known = optimizer.compression.errors
    for fqn, by_state in errors.items():
        known[fqn] = {**known.get(fqn, {}), **by_state}
    optimizer.compression.states_replaced(errors)
    warn_of_lossy(optimizer, errors)


def encode_assigned(optimizer: CompressedGroups) -> None:
    """Verify the states of all compressed layers, and encode dense ones that were assigned to them.

    Raises:
        ValueError: a layer was resized, or a state is neither what its codec stores nor a dense one. Nothing was
            changed then.
    """
    # Flat tensors apart: they are unknown before DeepSpeed's first step, and under ZeRO-3 no group shows them.
    tensors = [(optimizer.flat_group(flat), flat.tensor, flat.parts) for flat in optimizer.compression.flat or ()]
    if not any(map(optimizer.is_flat, optimizer.param_groups)):
        tensors += optimizer.compressed_tensors()
    for _, _, parts in tensors:
        for part in parts:
            part.check_shape()
    found = [
        find_assigned(group, tensor, parts, state, *optimizer.shared_layers(tensor, parts))
        for group, tensor, parts in tensors
        if parts and (state := optimizer.state.get(tensor))
    ]
    commit(optimizer, [encoded for encoded in found if encoded is not None])


def find_assigned(
    group: Mapping[str, Any],
    tensor: Tensor,
    parts: Sequence[LayerPart],
    state: dict[str, Any],
    shared: Sequence[SharedLayer],
    ranks: Sequence[Any],
) -> Encoded | None:
    """What is to replace assigned states; ``None`` if all is as the codecs store it. Changes nothing.

    Keys of neither a codec nor torch's optimizer are somebody else's (a wrapper's), and stay.

    Args:
        tensor: a parameter, whole or DTensor, or a flat tensor.
        parts: all that our rules step in it.
        state: ``optimizer.state[tensor]``, not empty.
        shared: layers in it and its counterparts on other ranks with states that these share; where one was assigned,
            it must have been on all of them, which then encode it together.
        ranks: their process groups; see `reduce_together`.

    Raises:
        ValueError: a state is neither what its codec stores nor a dense one, or the step is no count.
    """
    if is_fake(tensor):  # nothing can be read
        return None
    owner = parts[0].layer.fqn if parts[0].span is None else f"the flat tensor of {parts[0].prefix.removesuffix('.')}"
    numbers_on = tensor.device if stay_on_device(group, tensor, parts) else torch.device("cpu")
    found = Encoded(state)
    all_dense = True
    given: list[dict[str, Tensor]] = []
    for part in parts:
        dense: dict[str, Tensor] = {}
        for name, stored in part.layout(tensor).items():
            key = part.prefix + name  # of a flat tensor's parts never torch's own
            by_element = key in stored and _has_shape(state.get(key), stored[key])
            if name in state and not (by_element and key == name):
                dense[name] = _dense_rows(state[name], part, tensor, f"{owner}: its {name}")
                found.dense.add(name)
            elif by_element:
                if state[key].dtype != stored[key].dtype:  # assigned, or cast by a trainer
                    dense[name] = part.shard.as_rows(state[key])
                else:
                    _check_device(state[key], tensor, f"{owner}: its {key}")
            else:
                found.tensors |= _as_stored(stored, state, owner, part, name, tensor, numbers_on)
                all_dense = all_dense and not stored
        given.append(dense)
    if "step" not in state and not all_dense:
        raise ValueError(f"{owner}: its step is gone from optimizer.state; {_REMEDY}")
    steps = read_step(state.get("step", 1.0), owner)  # 1.0: SGD keeps none
    if not _is_count(state.get("step"), numbers_on):
        found.tensors["step"] = step_tensor(steps, numbers_on)
    if any(given):
        together = any(name in layer.sharing for layer in shared for name in found.dense)
        every = encode_parts(parts, tensor, group, given, shared if together else (), ranks)
        for part, dense, (encoded, errors) in zip(parts, given, every, strict=True):
            found.tensors |= encoded
            if dense and part.layer.compressed:
                found.errors[part.layer.fqn if part.span is None else part.prefix.removesuffix(".")] = errors
    return found if found.tensors or found.dense else None


def _is_count(step: Any, device: torch.device) -> bool:
    """Whether a step count is a tensor that counts on, and is where steps look for it."""
    return isinstance(step, Tensor) and step.dtype in (torch.float32, torch.float64) and step.device == device


_REMEDY = "assign dense states, or reset the layer with lightning_sketch.reset_states(optimizer, layers)"


def _as_stored(
    stored: Mapping[str, Tensor],
    state: Mapping[str, Any],
    owner: str,
    part: LayerPart,
    name: str,
    tensor: Tensor,
    numbers_on: torch.device,
) -> dict[str, Tensor]:
    """Entries to be put back into the dtype, and scales on the device, in which they are stored."""
    cast: dict[str, Tensor] = {}
    scale_key = key_of(part.prefix + name, "scale")
    zeroed = _is_zero(state.get(scale_key))
    for key, expected in stored.items():
        found = state.get(key)
        if key == scale_key and zeroed:
            cast[key] = scale_tensor(device=numbers_on)
        elif key == scale_key and key in state:
            scale = scale_tensor(found, f"{key.removeprefix(part.prefix)} of {part.layer.fqn}", numbers_on)
            if scale is not found:
                cast[key] = scale
        elif isinstance(found, Tensor) and _has_shape(found, expected):
            _check_device(found, tensor, f"{owner}: its {key}")
            if zeroed:
                cast[key] = torch.zeros_like(found, dtype=expected.dtype)
            elif found.dtype != expected.dtype:
                cast[key] = found.to(expected.dtype)
        else:
            instead = "" if key == name else f", or in its place {name} as a dense tensor of shape {list(tensor.shape)}"
            raise ValueError(
                f"{owner}: its {key} in optimizer.state is {_describe(found)}, expected a tensor of shape "
                f"{list(expected.shape)}{instead}; {_REMEDY}"
            )
    return cast


def _check_device(found: Tensor, tensor: Tensor, what: str) -> None:
    """Refuse a state that somebody moved away: kernels go by addresses, which mean something else on another device."""
    if found.device != tensor.device:
        raise ValueError(
            f"{what} in optimizer.state is on {found.device}, and the parameter on {tensor.device}: move it there "
            "before optimizer.step()"
        )


def _is_zero(scale: Any) -> bool:
    """Whether someone zeroed a state in place, entry by entry, as scripts do that reset moments."""
    # In another dtype it may have been cast, and come out as 0.
    return isinstance(scale, Tensor) and scale.dtype == torch.float64 and scale.numel() == 1 and not bool(scale)


def _dense_rows(dense: Any, part: LayerPart, tensor: Tensor, owner: str) -> Tensor:
    """The rows of an assigned dense state that `part` holds, ``[local_rows, *row_shape]``."""
    fits = isinstance(dense, Tensor) and dense.shape == tensor.shape and dense.is_floating_point()
    if fits and dense.layout is torch.strided and (not is_dtensor(dense) or _placed_alike(dense, tensor)):
        rows: Tensor = held_rows(dense, part.shard) if part.span is None else part.rows(dense)
        return rows
    placed = f" and placements {tensor.placements}" if is_dtensor(tensor) else ""  # type: ignore[attr-defined]
    raise ValueError(
        f"{owner} in optimizer.state is {_describe(dense)}; expected a dense tensor of shape {list(tensor.shape)}"
        f"{placed} in any floating dtype, which is then encoded"
    )


def _placed_alike(dense: Any, tensor: Any) -> bool:
    return is_dtensor(tensor) and (dense.device_mesh, dense.placements) == (tensor.device_mesh, tensor.placements)


def _has_shape(found: Any, expected: Tensor) -> bool:
    """Whether `found` is a local tensor of real numbers of that shape."""
    if not isinstance(found, Tensor) or is_dtensor(found):
        return False
    real = found.is_floating_point() or found.dtype == expected.dtype  # codes are integers, unless a trainer cast them
    return found.shape == expected.shape and real and found.layout is torch.strided


def _describe(value: Any) -> str:
    if value is None:
        return "missing"
    if not isinstance(value, Tensor):
        return repr(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"a {'DTensor' if is_dtensor(value) else 'tensor'} of shape {list(value.shape)} and {dtype}"
