"""The first phase of a step that ranks agree on: what the gradient here adds to the states that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sketch import kernels
from lightning_sketch.codecs import CodecState
from lightning_sketch.kernels.schema import Observed, observation
from lightning_sketch.rules.layer_step import LayerStep
from lightning_sketch.sharding import Block


class ToObserve(NamedTuple):
    """The step of a layer with states that ranks share.

    Args:
        layer: the step, of which numbers and the step's own are not needed.
        weight_decay: the coupled one.
        marks: of the rows that lie on several ranks, ``[local_rows]``: NaN is written where one is to be left out
            (modified in place); ``None`` if there are none.
    """

    layer: LayerStep
    weight_decay: float
    marks: Tensor | None

    def shared(self) -> list[CodecState]:
        """Its states that ranks share."""
        return [state for state in self.layer.states.values() if state.shared is not None]


def observe(layers: Sequence[ToObserve]) -> None:
    """Have the layers' shared states write into their `Shared` what the step will add; they do not change.

    Rows that are not finite add nothing, where they are to be left out.
    """
    by_kernel: list[tuple[ToObserve, list[CodecState]]] = []
    for each in layers:
        states = each.shared()
        for state in states:
            state.offer()
        observing = [state for state in states if state.observes]
        leaves_out = each.layer.leave_out and each.marks is not None
        if each.layer.gradient.values.numel() == 0 or not (observing or leaves_out):
            continue
        if observing and _takes_sums(each.layer, observing):
            by_kernel.append((each, observing))
        else:
            _observe(each, states, observing)
    wants = [(each, any(state.wants_columns for state in observing)) for each, observing in by_kernel]
    for (each, observing), found in zip(by_kernel, _sums(wants), strict=True):
        _take(each, observing, found)


def observe_agreed(layers: Sequence[ToObserve]) -> None:
    """The sums that shared states make after the ranks have agreed; see `CodecState.observes_agreed`."""
    by_kernel: list[tuple[ToObserve, list[CodecState]]] = []
    for each in layers:
        states = [state for state in each.shared() if state.observes_agreed]
        if not states or each.layer.gradient.values.numel() == 0:
            continue
        if _takes_sums(each.layer, states):
            by_kernel.append((each, states))
            continue
        each.layer.observe(*states, weight_decay=each.weight_decay)
        for block, g in each.layer.gradients(each.weight_decay):
            for state in states:
                state.observe_agreed(block, g if state.spec.signed else g.square())
        _forget(each.layer)
    for (_, states), found in zip(by_kernel, _sums([(each, True) for each, _ in by_kernel]), strict=True):
        assert found.columns is not None
        for state in states:
            state.observe_agreed_sums(found.columns)


def _takes_sums(layer: LayerStep, states: Sequence[CodecState]) -> bool:
    """Whether a kernel can make the sums that these states add."""
    device = layer.param.device
    return (
        all(state.takes_sums and not state.spec.signed for state in states)
        and kernels.observe_kernel(device) is not None
        and layer.fusable()
    )


def _sums(layers: Sequence[tuple[ToObserve, bool]]) -> list[Observed]:
    """Sums of the layers' gradients, of columns where that is said. One call for all of them."""
    if not layers:
        return []
    kernel = kernels.observe_kernel(layers[0][0].layer.param.device)
    assert kernel is not None
    return kernel(
        [
            observation(
                each.layer.param,
                each.layer.gradient.values,
                None if each.layer.gradient.rows is None else each.layer.gradient.rows.contiguous(),
                columns=columns,
                weight_decay=each.weight_decay,
                maximize=each.layer.maximize,
                leave_out=each.layer.leave_out,
            )
            for each, columns in layers
        ]
    )


def _take(each: ToObserve, states: Sequence[CodecState], found: Observed) -> None:
    """Have shared states write what a kernel found."""
    gradient, means, marks = each.layer.gradient, found.means, each.marks
    count = slice(0, means.numel())
    rows = count if gradient.rows is None else gradient.rows
    bad = None
    if each.layer.leave_out:
        bad = means.isnan()
        means = means.masked_fill(bad, 0.0)
    block = Block(gradient.shard, rows, count)
    for state in states:
        state.observe_sums(block, means, found.columns)
    if marks is not None and bad is not None:
        marks[rows] = marks[rows].masked_fill(bad, math.nan)


def _observe(each: ToObserve, states: Sequence[CodecState], observing: list[CodecState]) -> None:
    """`observe` in plain PyTorch."""
    layer, weight_decay, marks = each
    on_host = layer.gradient.values.device.type == "cpu"
    looked = not on_host or not observing or any(state.shares_squares for state in states)
    if layer.leave_out and looked:
        layer.observe(*states, weight_decay=weight_decay)
    before = [(x, x.clone()) for state in observing for x in _added(state)]  # parts share it
    _add(layer, observing, weight_decay)
    if layer.leave_out and not looked and not all(bool(x.sum().isfinite()) for x, _ in before):
        # A row that is not finite is in the sums. Once more without it.
        layer.observe(*states, weight_decay=weight_decay)
        for x, was in before:
            x.copy_(was)
        _add(layer, observing, weight_decay)
    if layer.finite is not None and marks is not None:
        rows = slice(None) if layer.gradient.rows is None else layer.gradient.rows
        marks[rows] = marks[rows].masked_fill(layer.finite.logical_not(), math.nan)
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
