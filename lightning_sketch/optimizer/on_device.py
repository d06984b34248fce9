"""Numbers that a step leaves on the device: its number, a learning rate in a tensor, and what a gradient scaler found.

Then the host reads nothing of a step, so the step waits for nothing and can be captured into a CUDA graph. torch keeps
``step`` on the device where a group says ``capturable`` or ``fused``; compressed layers do the same, with the scales of
their codecs. SGD's are there always: torch's counts no steps, and can be captured without an option. Adagrad and
SparseAdam have no such option in torch, but groups may say it: ``Adagrad([{"params": ..., "capturable": True}])``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices

from lightning_sketch.layers.record import RECORDS, LayerPart, part_of

if TYPE_CHECKING:
    from lightning_sketch.policy.plan import Plan
    from lightning_sketch.rules import UpdateRule

#: Kinds of devices on which numbers may stay: torch's list for ``capturable``.
DEVICES: tuple[str, ...] = tuple(_get_capturable_supported_devices())


def stay_on_device(group: Mapping[str, Any], param: Tensor, parts: Iterable[LayerPart]) -> bool:
    """Whether the numbers of a tensor's parts stay on its device."""
    return asked(group)[1] and param.device.type in DEVICES and not any(_reads(part) or part.sharing for part in parts)


def scaler_on_device(made: Plan, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step can take from the device what a gradient scaler found: all layers are there, and fused."""
    return all(
        group.get("fused")
        and param.device.type in DEVICES
        and planned.layer.stock_count is None
        and not (planned.record and part_of(planned.record, param).sharing)
        for group, plans in zip(groups, made.groups, strict=True)
        for param, planned in zip(group["params"], plans, strict=True)
    )


def asked(group: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a group says ``capturable``, and whether numbers may stay on the device at all."""
    capturable = bool(group.get("capturable"))
    return capturable, capturable or bool(group.get("fused")) or "dampening" in group  # SGD's


def _reads(part: LayerPart) -> bool:
    """Whether the host must read something in a step of this part."""
    return any(codec.needs_host for codec in part.layer.codecs.values())


def check_capturable(group: Mapping[str, Any], param: Tensor, parts: Sequence[LayerPart], *, compiling: bool) -> None:
    """Refuse what cannot be stepped under ``capturable=True``.

    Raises:
        AssertionError: the parameter is on a device without graphs and the step is not compiled, as under torch.
        ValueError: a codec needs the host in every step, or a hyperparameter but the learning rate is on a device.
    """
    fqn = parts[0].layer.fqn
    if param.device.type not in DEVICES:
        if compiling:
            return
        raise AssertionError(
            f"If capturable=True, params and state_steps must be on supported devices: {list(DEVICES)}. "
            f"{fqn} is on {param.device.type}; set capturable=False there"
        )
    for part in parts:
        for state, codec in part.layer.codecs.items():
            if codec.needs_host:
                raise ValueError(
                    f"capturable=True: {type(codec).__name__} of {state} of {part.layer.fqn} {codec.needs_host}, for "
                    "which the host waits for the device; choose it without that option, or set capturable=False"
                )
    for name, value in group.items():
        values = value if isinstance(value, tuple) else (value,)
        if name != "lr" and any(isinstance(x, Tensor) and x.device.type != "cpu" for x in values):
            raise ValueError(
                f"capturable=True: {name} is a tensor on a device, and {fqn} is compressed; of compressed layers only "
                "lr may be one: give the others as numbers"
            )


def check_capture(param: Tensor, grad: Tensor, parts: Sequence[LayerPart], *, on_device: bool, bound: bool) -> None:
    """Refuse what would go into a graph with the numbers of this one step.

    Raises:
        RuntimeError: says which layer, and what to do.
    """
    fqn = parts[0].layer.fqn
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {fqn} is sparse, and a step with it cannot be captured into a graph: how many rows there "
            "are changes from step to step. Use dense gradients (sparse=False), or make this step outside of the graph"
        )
    if not on_device:
        raise RuntimeError(
            f"a step of {fqn} cannot be captured into a graph: its step count is kept on the host, and every replay "
            "would repeat this step. Adam, AdamW and RMSprop take capturable=True; SGD needs no option; of Adagrad and "
            'SparseAdam parameter groups do, as Adagrad([{"params": ..., "capturable": True}]). Codecs with lazy=True '
            "or cleaning_interval cannot be captured, nor can states that ranks share"
        )
    if not bound:
        raise RuntimeError(
            f"a graph is captured, and {fqn} was not stepped since its states were made or loaded: make a few steps on "
            "a side stream first, as torch's documentation of CUDA graphs says"
        )


def check_kept_capture(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to capture kept layers whose steps torch's optimizer would have every replay repeat, and does not refuse.

    Raises:
        RuntimeError: Adagrad with ``lr_decay`` counts their steps on the host.
    """
    for group in groups:
        if not group.get("lr_decay"):  # without one the count is for nothing
            continue
        kept = [p for p, record in zip(group["params"], group.get(RECORDS, ()), strict=False) if record is None]
        if any(param.grad is not None for param in kept):
            raise RuntimeError(
                "a graph is captured of a step of torch's Adagrad with lr_decay: it counts the steps of layers that "
                "the policy keeps on the host, and every replay would repeat this one. Set lr_decay=0, or put these "
                "layers into an optimizer of their own that is stepped outside of the graph"
            )


def numbers_of(rule: UpdateRule, group: Mapping[str, Any], steps: Tensor) -> list[Any]:
    """What `UpdateRule.numbers` says, made for all layers of a group at once.

    Args:
        steps: numbers of the layers' steps, float64 ``[layers]`` on the device.

    Returns:
        for each layer, with 0-d tensors where a number is known on the device alone.
    """
    return _each(rule.numbers(group, steps), len(steps))


def _each(numbers: Any, count: int) -> list[Any]:
    if isinstance(numbers, Tensor):
        return list(numbers.expand(count).unbind())
    if isinstance(numbers, tuple):
        return list(zip(*(_each(x, count) for x in numbers), strict=True))
    if dataclasses.is_dataclass(numbers) and not isinstance(numbers, type):
        fields = {f.name: getattr(numbers, f.name) for f in dataclasses.fields(numbers)}
        split = {name: _each(value, count) for name, value in fields.items() if isinstance(value, Tensor)}
        return [dataclasses.replace(numbers, **{n: values[i] for n, values in split.items()}) for i in range(count)]
    return [numbers] * count
