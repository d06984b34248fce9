"""The first phase of a step that ranks agree on: what the gradient here adds to the states that they share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sketch.codecs import CodecState
from lightning_sketch.rules.base import LayerStep


def observe(layer: LayerStep, weight_decay: float, marks: Tensor | None) -> None:
    """Have the layer's shared states write into their `Shared` what the step will add; they do not change.

    Rows that are not finite add nothing, where they are to be left out.

    Args:
        layer: the step, of which numbers and the step's own are not needed.
        weight_decay: the coupled one.
        marks: of the rows that lie on several ranks, ``[local_rows]``: NaN is written where one is to be left out
            (modified in place); ``None`` if there are none.
    """
    states = [state for state in layer.states.values() if state.shared is not None]
    for state in states:
        state.offer()
    values = layer.gradient.values
    observing = [state for state in states if state.observes]
    on_host = values.device.type == "cpu"
    if values.numel() == 0 or not (observing or (layer.leave_out and marks is not None)):
        return
    if layer.leave_out and (not on_host or not observing):
        layer.observe(*states)
    before = [(state, x, x.clone()) for state in observing for x in _added(state)]  # parts share it
    _add(layer, observing, weight_decay)
    if layer.leave_out and on_host and not all(bool(x.sum().isfinite()) for _, x, _ in before):
        # A row that is not finite is in the sums. Once more without it.
        layer.observe(*states)
        for _, x, was in before:
            x.copy_(was)
        _add(layer, observing, weight_decay)
    if layer.finite is not None and marks is not None:
        rows = slice(None) if layer.gradient.rows is None else layer.gradient.rows
        marks[rows] = marks[rows].masked_fill(layer.finite.logical_not(), math.nan)
    _forget(layer)


def observe_agreed(layer: LayerStep, weight_decay: float) -> None:
    """The sums that shared states make after the ranks have agreed; see `CodecState.observes_agreed`."""
    states = [state for state in layer.states.values() if state.shared is not None and state.observes_agreed]
    if not states or layer.gradient.values.numel() == 0:
        return
    layer.observe(*states)
    for block, g in layer.gradients(weight_decay):
        for state in states:
            state.observe_agreed(block, g if state.spec.signed else g.square())
    _forget(layer)


def _add(layer: LayerStep, states: list[CodecState], weight_decay: float) -> None:
    if not states:
        return
    squares = not all(state.spec.signed for state in states)
    for block, g in layer.gradients(weight_decay):
        square = g.square() if squares else g
        for state in states:
            state.observe(block, g if state.spec.signed else square)
    for state in states:
        state.finish_observing(layer.gradient.rows)


def _added(state: CodecState) -> list[Tensor]:
    shared = state.shared
    assert shared is not None
    return [x for x in (shared.rows, shared.whole, shared.touched_rows, shared.touched) if x is not None]


def _forget(layer: LayerStep) -> None:
    layer.finite, layer.by_element = None, False  # the step finds them again
    layer.gradient.forget_blocks()


def leave_out_marked(values: Tensor, marks: Tensor) -> Tensor:
    """A gradient in which rows that another rank leaves out are not finite here, either.

    Args:
        values: ``[k, *row_shape]`` of all rows (modified in place on accelerators, where nothing is read from `marks`).
        marks: ``[k]``, NaN where a row is to be left out.
    """
    if values.numel() == 0:
        return values
    bad = marks.isnan()
    if values.device.type == "cpu":
        if not bool(bad.any()):
            return values
        values = values.clone()
    first = values
    while first.ndim > 1:
        first = first[:, 0]
    first.add_(torch.where(bad, math.nan, 0.0).to(values.dtype))
    return values
