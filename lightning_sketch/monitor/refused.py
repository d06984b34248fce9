"""What cannot be watched, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_sketch.layers.record import LayerPart, LayerRecord


def refuse(layers: Iterable[LayerRecord], groups: Iterable[Mapping[str, Any]], *, step_in_backward: bool) -> None:
    """Refuse what can be known before the first step.

    Args:
        layers: the compressed ones.
        groups: the optimizer's parameter groups.

    Raises:
        ValueError: says what cannot be watched, and what to do.
    """
    if stock := [layer.fqn for layer in layers if layer.stock_count is not None]:
        raise ValueError(
            f"a monitor cannot watch {', '.join(stock)}: the optimizer's own step updates them, and rows cannot be "
            "stepped by themselves. Only layers of Adam, AdamW, SparseAdam, Adagrad, RMSprop and SGD can be watched; "
            "convert this optimizer by a call of its own, without a monitor"
        )
    if step_in_backward:
        raise ValueError(
            "a monitor cannot watch steps in backward, whose gradients are gone when optimizer.step() is called: leave "
            "step_in_backward=False while you measure"
        )
    if any(group.get("capturable") for group in groups):
        raise ValueError(
            "a monitor cannot watch capturable=True: replays of a graph would not tell it of their steps. Set "
            "capturable=False while you measure"
        )


def refuse_part(part: LayerPart) -> None:
    """Refuse a part of a layer that is no whole rows.

    Raises:
        RuntimeError: says which layer, and what to do.
    """
    if part.span is not None or part.shard.part_shape is not None:
        raise RuntimeError(
            f"a monitor cannot watch {part.layer.fqn}, whose rows are cut: other ranks have the rest of them. Shard it "
            "by rows (Shard(0), FSDP2's default), or train without a monitor: monitor.detach(optimizer)"
        )
