"""The phase of a step in which ranks agree on what they add to states that they share.

One collective for all layers of an optimizer: every rank writes into one buffer what its gradients add, all buffers are
added up, and every rank folds the sums in (a second collective, of the largest, is made where there is `SM3`). Which
layers take part, and where in the buffer, follows from the plan, never from which gradients are there: so all ranks
come to the same collectives. A layer without a gradient here takes part with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lightning_sketch.layers.record import LayerPart
from lightning_sketch.layers.shared import Slots
from lightning_sketch.optimizer.bound import PendingUpdate
from lightning_sketch.rules import LayerStep, UpdateRule
from lightning_sketch.rules.observe import leave_out_marked, observe, observe_agreed
from lightning_sketch.sharding.agree import reduce_together
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
    buffers: dict[tuple[int, torch.device], _Buffer] = {}
    for own in tensors:
        if own.ranks is not None:
            key = id(own.ranks), own.param.device
            buffers.setdefault(key, _Buffer(own.ranks)).tensors.append(own)
    without: set[int] = set()
    for buffer in buffers.values():
        buffer.lay_out()
        for own in buffer.tensors:
            buffer.observe(rule, own, leave_out)
        reduce_together(buffer.sums, buffer.ranks)
        reduce_together(buffer.largest, buffer.ranks, largest=True)
        for own in buffer.tensors:
            # Read only where there is no gradient here: then the host waits for the device.
            if own.grad is None and not any(float(slots.present) for slots in buffer.slots[id(own)].values()):
                without.add(id(own))
                continue
            if own.bound is None:
                bind(own)
                buffer.share(own)
            if leave_out:
                buffer.leave_out(own)
            for layer, _ in _steps(own, leave_out):
                observe_agreed(layer, rule.coupled_weight_decay(own.group))
    return [own for own in tensors if id(own) not in without]


class _Buffer:
    """What layers that are divided over the same ranks add.

    Attributes:
        tensors: that take part, in the plan's order.
        sums, largest: the buffer, in two.
        slots: for each tensor, of each of its layers by name.
    """

    def __init__(self, ranks: Any) -> None:
        self.ranks = ranks
        self.tensors: list[PendingUpdate] = []
        self.slots: dict[int, dict[str, Slots]] = {}

    def lay_out(self) -> None:
        """Make the buffer, of zeros."""
        sums, largest = (sum(of_layer.sizes[i] for own in self.tensors for of_layer in own.shared) for i in (0, 1))
        params = [own.param for own in self.tensors]
        dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
        self.sums = torch.zeros(sums, dtype=dtype, device=params[0].device)
        self.largest = torch.zeros(largest, dtype=dtype, device=params[0].device)
        at_sum = at_largest = 0
        for own in self.tensors:
            here = self.slots[id(own)] = {}
            for of_layer in own.shared:
                size, size_largest = of_layer.sizes
                here[of_layer.fqn] = of_layer.lay_out(
                    self.sums[at_sum : at_sum + size], self.largest[at_largest : at_largest + size_largest]
                )
                at_sum, at_largest = at_sum + size, at_largest + size_largest

    def observe(self, rule: UpdateRule, own: PendingUpdate, leave_out: bool) -> None:
        """Write what this rank adds."""
        if own.grad is not None:
            for slots in self.slots[id(own)].values():
                slots.present.fill_(1.0)
        if own.bound is None:
            return
        self.share(own)
        for layer, part in _steps(own, leave_out):
            marks = self.slots[id(own)][part.layer.fqn].marks_of(part.shard)
            observe(layer, rule.coupled_weight_decay(own.group), marks)

    def share(self, own: PendingUpdate) -> None:
        """Give the shared states of a tensor's parts their numbers."""
        for part, bound in zip(own.parts, own.bound or (), strict=True):
            for state in part.sharing:
                bound.states[state].share(self.slots[id(own)][part.layer.fqn].of_shard(part.shard, state))

    def leave_out(self, own: PendingUpdate) -> None:
        """Leave out the rows that any rank does."""
        for i, part in enumerate(own.parts):
            marks = self.slots[id(own)][part.layer.fqn].marks_of(part.shard) if part.sharing else None
            held = own.gradients[i]
            if marks is not None and held.rows is None:
                own.gradients[i] = RowGradient(held.shard, None, leave_out_marked(held.values, marks), held.left_out)
        for slots in self.slots[id(own)].values():
            for state, sharing in slots.shared.sharing.items():
                rows = slots.states[state].all_rows
                if rows is not None and not sharing.largest:
                    rows.masked_fill_(rows.isnan(), 0.0)


def _steps(own: PendingUpdate, leave_out: bool) -> Iterator[tuple[LayerStep, LayerPart]]:
    """The steps of parts with shared states, as far as they are known before the ranks have agreed."""
    maximize = bool(own.group.get("maximize", False))
    for part, bound, gradient in zip(own.parts, own.bound or (), own.gradients, strict=True):
        if part.sharing and own.grad is not None:
            yield bound.step(gradient, None, 0, maximize=maximize, leave_out=leave_out), part
