"""Steps of many layers: in fused kernels where there are some, else by the reference."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from lightning_sketch import kernels
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.rules import alike
from lightning_sketch.rules.base import UpdateRule
from lightning_sketch.rules.layer_step import LayerStep


def run(rule: UpdateRule, layers: Iterable[LayerStep]) -> Tensor | None:
    """Perform the steps of layers: together in fused kernels where that is possible, the others by the reference.

    Returns:
        how many rows of each layer were left out (elements, where all states are element-wise), int64
        ``[len(layers)]`` on a device of theirs, for which it does not wait; ``None`` for none, where that is known.
    """
    # Apart where numbers stay on the device: such steps read other tables.
    fused: dict[tuple[torch.device, bool], tuple[kernels.FusedKernel, list[int], list[FusedStep]]] = {}
    by_device: dict[torch.device, kernels.FusedKernel | None] = {}
    left_out: dict[int, Tensor] = {}  # by layer: what no kernel counts
    together: dict[Hashable, list[tuple[int, LayerStep]]] = {}  # what the reference steps at once
    total = 0
    for number, layer in enumerate(layers):
        total, device = number + 1, layer.param.device
        if device not in by_device:
            by_device[device] = kernels.fused_kernel(device)
            kernels.announce(device)
        kernel, count = by_device[device], layer.gradient.left_out
        if kernel is not None and layer.fusable() and rule.fusable(layer.states):
            layer.fused = True
            _, numbers, steps = fused.setdefault((device, layer.on_device is not None), (kernel, [], []))
            numbers.append(number)
            steps.append(rule.fuse(layer))
        elif (kind := alike.kind(layer)) is not None:
            together.setdefault(kind, []).append((number, layer))
        else:
            observed = rule.reference(layer)
            count = observed if count is None else count
            layer.gradient.forget_blocks()
        if count is not None:
            left_out[number] = count
    for members in together.values():
        size = alike.evenly(len(members), alike.most_together(members[0][1].param.numel()))
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            some = [layer for _, layer in batch]
            if len(some) == 1:
                counts = None if (count := rule.reference(some[0])) is None else count.view(1)
                some[0].gradient.forget_blocks()
            else:
                counts = alike.step_together(rule.reference, some)
            if counts is not None:
                left_out |= dict(zip((number for number, _ in batch), counts.unbind(), strict=True))
    by_kernel = [(numbers, kernel(steps)) for kernel, numbers, steps in fused.values()]
    if len(by_kernel) == 1 and not left_out and len(by_kernel[0][0]) == total:
        return by_kernel[0][1]
    for numbers, counts in by_kernel:
        left_out = dict(zip(numbers, counts.unbind(), strict=True)) | left_out
    if not left_out:
        return None
    device = next((x.device for x in left_out.values() if x.device.type != "cpu"), torch.device("cpu"))
    none = torch.zeros((), dtype=torch.int64, device=device)
    return torch.stack([left_out[i].to(device, non_blocking=True) if i in left_out else none for i in range(total)])
