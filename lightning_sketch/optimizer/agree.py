"""The phase of a step in which ranks agree on what they add to states that they share.

One collective for all layers of an optimizer: every rank writes into one buffer what its gradients add, all buffers are
added up, and every rank folds the sums in (a second collective, of the largest, is made where there is `SM3`). Which
layers take part, and where in the buffer, follows from the plan, never from which gradients are there: so all ranks
come to the same collectives. A layer without a gradient here takes part with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lightning_sketch.layers.record import LayerPart
from lightning_sketch.layers.shared import Buffer
from lightning_sketch.optimizer.bound import PendingUpdate
from lightning_sketch.rules import LayerStep, UpdateRule
from lightning_sketch.rules.observe import ToObserve, leave_out_marked, observe, observe_agreed
from lightning_sketch.sharding.gradient import RowGradient


def agree(
    rule: UpdateRule, tensors: list[PendingUpdate], bind: Callable[[PendingUpdate], None], *, leave_out: bool
) -> list[PendingUpdate]:
    """Have the ranks agree on a step; afterwards shared states are ready to begin it. Collective.

    Args:
        tensors: to be stepped, or without a gradient here; bound, but for those that have neither gradient nor state.
        bind: binds a tensor.
        leave_out: whether rows that are not finite are left out.

    Returns:
        those to be stepped: not those that have a gradient on no rank.

    Raises:
        RuntimeError: another rank did not come. No state was changed.
    """
    by_ranks: dict[tuple[tuple[int, ...], torch.device], list[PendingUpdate]] = {}
    for own in tensors:
        if own.ranks:
            by_ranks.setdefault((tuple(map(id, own.ranks)), own.param.device), []).append(own)
    without: set[int] = set()
    for (_, device), sharing in by_ranks.items():
        wide = any(own.param.dtype == torch.float64 for own in sharing)
        layers = [layer for own in sharing for layer in own.shared]
        buffer = Buffer(layers, device, torch.float64 if wide else torch.float32)
        observe([each for own in sharing for each in _to_observe(rule, own, buffer, leave_out)])
        buffer.reduce(sharing[0].ranks)
        for own in sharing:
            # Read only where there is no gradient here: then the host waits for the device.
            if own.grad is None and not any(float(buffer.slots[layer.fqn].present) for layer in own.shared):
                without.add(id(own))
                for part, bound in zip(own.parts, own.bound or (), strict=False):
                    for state in part.sharing:
                        bound.states[state].forget_shared()
                continue
            if own.bound is None:
                bind(own)
                _share(own, buffer)
            if leave_out:
                _leave_out(own, buffer)
        stepped = [own for own in sharing if id(own) not in without and own.grad is not None]
        decays = {id(own): rule.coupled_weight_decay(own.group) for own in stepped}
        observe_agreed(
            [ToObserve(layer, decays[id(own)], None) for own in stepped for layer, _ in _steps(own, leave_out)]
        )
    return [own for own in tensors if id(own) not in without]


def _to_observe(rule: UpdateRule, own: PendingUpdate, buffer: Buffer, leave_out: bool) -> Iterator[ToObserve]:
    """The steps of a tensor's parts, whose shared states are to write into the buffer what this rank adds."""
    if own.grad is not None:
        for layer in own.shared:
            buffer.slots[layer.fqn].present.fill_(1.0)
    if own.bound is None:
        return
    _share(own, buffer)
    for step, part in _steps(own, leave_out):
        marks = buffer.slots[part.layer.fqn].marks_of(part.shard)
        yield ToObserve(step, rule.coupled_weight_decay(own.group), marks)


def _share(own: PendingUpdate, buffer: Buffer) -> None:
    """Give the shared states of a tensor's parts their numbers in the buffer."""
    for part, bound in zip(own.parts, own.bound or (), strict=True):
        for state in part.sharing:
            bound.states[state].share(buffer.slots[part.layer.fqn].of_shard(part.shard, state))


def _leave_out(own: PendingUpdate, buffer: Buffer) -> None:
    """Leave out the rows that any rank does."""
    for i, part in enumerate(own.parts):
        marks = buffer.slots[part.layer.fqn].marks_of(part.shard) if part.sharing else None
        held = own.gradients[i]
        if marks is not None and held.rows is None:
            own.gradients[i] = RowGradient(held.shard, None, leave_out_marked(held.values, marks), held.left_out)
    for layer in own.shared:
        for state, sharing in layer.sharing.items():
            rows = buffer.slots[layer.fqn].states[state].all_rows
            if rows is not None and not sharing.largest:
                rows.masked_fill_(rows.isnan(), 0.0)


def _steps(own: PendingUpdate, leave_out: bool) -> Iterator[tuple[LayerStep, LayerPart]]:
    """The steps of parts with shared states, as far as they are known before the ranks have agreed."""
    maximize = bool(own.group.get("maximize", False))
    for part, bound, gradient in zip(own.parts, own.bound or (), own.gradients, strict=True):
        if part.sharing and own.grad is not None:
            yield bound.step(gradient, None, 0, maximize=maximize, leave_out=leave_out), part
