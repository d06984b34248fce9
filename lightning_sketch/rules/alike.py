"""Small layers that are alike, stepped together by the reference on an accelerator: what it does is launched once.

On 200 layers of 1,024 x 256 the reference would launch 5,000 to 60,000 kernels, most of which are done before the next
is launched. So parameters, gradients and states of layers that differ in nothing but values and seeds are stacked,
``torch.vmap`` runs the reference over them, and what it changed is copied back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import CodecState
from lightning_sketch.rules.layer_step import LayerStep
from lightning_sketch.sharding.gradient import RowGradient

#: Elements of layers that are stepped together, at most.
MOST_NUMEL = 3 << 23


def most_together(numel: int) -> int:
    """How many layers of `numel` elements are stepped at once, at most."""
    return MOST_NUMEL // max(1, numel)


def evenly(count: int, most: int) -> int:
    """How many layers each batch has, so that batches are as few and as equal as can be."""
    return -(-count // -(-count // most))


def pays(device: torch.device) -> bool:
    """Whether stepping layers together is faster: where launches take longer than what they do."""
    return device.type != "cpu"


def kind(layer: LayerStep) -> Hashable | None:
    """What layers that are stepped together have in common; ``None`` where a layer is stepped alone."""
    gradient, param = layer.gradient, layer.param
    if layer.alike is None or not pays(param.device) or gradient.rows is not None or gradient.left_out is not None:
        return None
    if any(state.shared is not None for state in _states(layer)):  # what ranks agreed on is each layer's own
        return None
    if most_together(param.numel()) < 2 or param.numel() == 0 or gradient.values.dtype != param.dtype:
        return None
    device = layer.on_device
    leaves = tuple(None if isinstance(x, Tensor) else x for x in _leaves(layer.numbers))
    if device is None:
        step: Any = layer.step, *(state.host_scale() for state in _states(layer))
    else:
        step = id(device.found_inf), id(device.grad_scale)
    return layer.alike, type(layer.numbers), leaves, step, layer.maximize, layer.leave_out


def step_together(reference: Callable[[LayerStep], Tensor | None], layers: Sequence[LayerStep]) -> Tensor | None:
    """Steps of layers of one `kind` (parameters and states are modified in place).

    Args:
        reference: `UpdateRule.reference`.

    Returns:
        of each layer how many rows or elements were left out, int64 ``[len(layers)]``; ``None`` for none, where that is
        known.
    """
    first = layers[0]
    keys = _keys(first)
    kept = [[layer.param, *(_tensors(layer)[key] for key in keys)] for layer in layers]
    stacked = [torch.stack(alike) for alike in zip(*kept, strict=True)]
    values = torch.stack([layer.gradient.values for layer in layers])
    numbers = [torch.stack(alike) for alike in zip(*(_device_numbers(layer) for layer in layers), strict=True)]
    copies: list[CodecState] = []
    counted = True

    def one(seed: Tensor, values: Tensor, numbers: list[Tensor], param: Tensor, *tensors: Tensor) -> Tensor:
        nonlocal counted
        held = dict(zip(keys, tensors, strict=True))
        states = {name: state.rebound(seed, held) for name, state in first.states.items()}
        momentum = None if first.momentum is None else first.momentum.rebound(seed, held)
        copies[:] = states.values()
        gradient = RowGradient(first.gradient.shard, None, values, most_blocks=1)
        rest = iter(numbers)
        layer = dataclasses.replace(
            first, param=param, gradient=gradient, states=states, momentum=momentum, finite=None, by_element=False
        )
        if first.on_device is not None:
            layer.step = next(rest)
            layer.on_device = dataclasses.replace(first.on_device, step=layer.step)
            layer.numbers = _with_leaves(first.numbers, rest)
        count = reference(layer)
        counted = count is not None
        return seed if count is None else count

    counts: Tensor = torch.vmap(one, in_dims=(0, 0, 0, 0, *([0] * len(keys))))(
        _seeds(layers), values, numbers, *stacked
    )
    torch._foreach_copy_(
        [tensor for row in zip(*kept, strict=True) for tensor in row], [x for each in stacked for x in each.unbind()]
    )
    if first.on_device is None:
        for layer in layers:
            for state, copy in zip(_states(layer), copies, strict=True):
                state.take_scale(copy)
    return counts if counted else None


def _states(layer: LayerStep) -> list[CodecState]:
    return list(layer.states.values())


def _tensors(layer: LayerStep) -> Any:
    return next(iter(layer.states.values())).tensors if layer.states else {}


def _keys(layer: LayerStep) -> list[str]:
    """Keys of the states' tensors that are to be stacked; a scale on the host is the same for all."""
    names = tuple(state.spec.name for state in layer.states.values())
    return [
        key
        for key in _tensors(layer)
        if key.startswith(names) and (layer.on_device is not None or not key.endswith("_scale"))
    ]


def _device_numbers(layer: LayerStep) -> list[Tensor]:
    """0-d tensors: the step's number, and what of its hyperparameters is known on the device alone."""
    if layer.on_device is None:
        return []
    return [layer.on_device.step, *(x for x in _leaves(layer.numbers) if isinstance(x, Tensor))]


def _leaves(numbers: Any) -> list[Any]:
    if isinstance(numbers, tuple):
        return list(numbers)
    if dataclasses.is_dataclass(numbers) and not isinstance(numbers, type):
        return [getattr(numbers, f.name) for f in dataclasses.fields(numbers)]
    return [numbers]


def _with_leaves(numbers: Any, tensors: Any) -> Any:
    leaves = [next(tensors) if isinstance(x, Tensor) else x for x in _leaves(numbers)]
    if isinstance(numbers, tuple):
        return tuple(leaves)
    if dataclasses.is_dataclass(numbers) and not isinstance(numbers, type):
        return type(numbers)(*leaves)
    return leaves[0]


def _seeds(layers: Sequence[LayerStep]) -> Tensor:
    """The layers' hash seeds on their device, int64 ``[len(layers)]``: made there once for these layers."""
    cache, device = layers[0].cache, layers[0].param.device
    seeds = [state.spec.seed for layer in layers for state in _states(layer)[:1]] or [0] * len(layers)
    if cache.seeds is None or cache.seeds[0] != seeds:
        each = [torch.full((), seed, dtype=torch.int64, device=device) for seed in seeds]  # copies nothing there
        cache.seeds = seeds, torch.stack(each)
    found: Tensor = cache.seeds[1]
    return found
