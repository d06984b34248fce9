"""Steps of states on which ranks have agreed: kernels against the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sketch import BFloat16, Codec, CountSketch, Drop, Factored, Keep, RowWise, kernels
from lightning_sketch.layers.flat import NamedSegment, layer_parts
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.shared import Buffer, SharedLayer
from lightning_sketch.optimizer.bound import BoundPart
from lightning_sketch.rules import AdamWRule, run
from lightning_sketch.rules.observe import ToObserve, observe, observe_agreed
from lightning_sketch.sharding import Cut
from lightning_sketch.sharding.dtensor import even_shard
from lightning_sketch.sharding.gradient import RowGradient

SHAPE, STEPS = (21, 36), 3
SECOND: tuple[Codec, ...] = (RowWise(), RowWise(compression=3), Factored(floor=2.0))
FIRST: tuple[Codec, ...] = (Drop(), Keep(), BFloat16(), CountSketch(compression=3))
CUTS: tuple[Cut, ...] = ("rows", "columns", "anywhere")
GROUP: dict[str, Any] = {
    "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True
}  # fmt: skip


def parts_of(layer: LayerRecord, cut: Cut) -> tuple[list[LayerPart], SharedLayer]:
    """The parts of the first rank of two, and what it shares."""
    cut_rows: tuple[int, ...] = ()
    if cut == "anywhere":
        numel = 10 * SHAPE[1] + 7  # a row is cut
        segment = NamedSegment(layer.fqn, SHAPE, 0, numel, 0)
        parts, cut_rows = list(layer_parts(layer, segment, cut)), (10,)
    else:
        parts = [LayerPart(layer, even_shard(SHAPE, int(cut == "columns"), 2, 0, agree=True))]
    return parts, SharedLayer(layer.fqn, SHAPE, cut, layer.sharing(cut), cut_rows)


def stepped(second: Codec, first: Codec, cut: Cut, *, bad: bool = False) -> dict[str, Tensor]:
    """Parameter and states after steps in which the other rank adds nothing."""
    layer = LayerRecord(
        "layer.weight", 7, SHAPE, {"exp_avg": True, "exp_avg_sq": False}, {"exp_avg": first, "exp_avg_sq": second}
    )
    parts, shared = parts_of(layer, cut)
    rule, generator = AdamWRule(), torch.Generator().manual_seed(0)
    flat = torch.randn(math.prod(SHAPE), generator=generator)
    tensors: dict[str, Any] = {}
    held = flat[: sum(math.prod(part.shard.local_shape) for part in parts)]
    params = [held if part.span is not None else held.view(part.shard.local_shape) for part in parts]
    for part in parts:
        tensors |= part.allocate(held, GROUP)
    for step in range(1, STEPS + 1):
        bound = [BoundPart.bind(part, param, GROUP, tensors) for part, param in zip(parts, params, strict=True)]
        gradients = [RowGradient(part.shard, None, gradient_of(part, step, bad)) for part in parts]
        buffer = Buffer([shared] if shared.sharing else [], torch.device("cpu"), torch.float32)
        slots = buffer.slots.get(layer.fqn)
        for part, each, gradient in zip(parts, bound, gradients, strict=True):
            if slots is None:
                continue
            for state in part.sharing:
                each.states[state].share(slots.of_shard(part.shard, state))
            observed = each.step(gradient, None, 0, maximize=False, leave_out=True)
            observe([ToObserve(observed, 0.0, slots.marks_of(part.shard))])
            for shares in slots.states.values():
                if shares.all_rows is not None:
                    shares.all_rows.nan_to_num_(nan=0.0)
            observe_agreed([ToObserve(observed, 0.0, None)])
        numbers = rule.numbers(GROUP, step)
        run(
            rule,
            [b.step(g, numbers, step, maximize=False, leave_out=True) for b, g in zip(bound, gradients, strict=True)],
        )
    return {"param": held} | tensors


def gradient_of(part: LayerPart, step: int, bad: bool) -> Tensor:
    found = torch.randn(part.shard.local_shape, generator=torch.Generator().manual_seed(step))
    if bad and step == 2:
        found[len(found) // 2, 1] = torch.nan
    return found


def check(second: Codec, first: Codec, cut: Cut, monkeypatch: Any, *, bad: bool = False) -> None:
    """The kernels do as the reference."""
    found = stepped(second, first, cut, bad=bad)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "fused_kernel", lambda device: None)
        patch.setattr(kernels, "observe_kernel", lambda device: None)
        expected = stepped(second, first, cut, bad=bad)
    for key, value in expected.items():
        atol = 2.0**-18 * max(1e-30, float(value.float().abs().max()))
        if value.dtype == torch.bfloat16:
            atol = 2.0**-7 * float(value.float().abs().max())  # the last bit of what is rounded may differ
        torch.testing.assert_close(
            found[key].float(), value.float(), rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
        )
