r"""Adagrad, and with the `SM3` codec the optimizer SM3.

.. math::
    s \leftarrow s + g^2, \quad \theta \leftarrow \theta - \frac{\eta}{1 + (t - 1) \gamma} \frac{g}{\sqrt{s} + \epsilon}

References:
    Duchi et al., *Adaptive subgradient methods*, JMLR 2011
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_sketch.rules.base import LayerStep, StateDef, UpdateRule, begin_momentum, precondition, safe_divide


class AdagradRule(UpdateRule):
    """Adagrad with ``lr_decay`` (the gamma above) and ``initial_accumulator_value``."""

    name: ClassVar[str] = "adagrad"

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        return (StateDef("sum", signed=False),)

    def reference(self, layer: LayerStep) -> None:
        group = layer.group
        lr = float(group["lr"]) / (1 + (layer.step - 1) * float(group["lr_decay"]))
        eps, weight_decay = float(group["eps"]), float(group["weight_decay"])

        total = layer.begin("sum", decay=1.0, weight=1.0)
        assert total is not None  # `Drop` refuses second moments
        begin_momentum(layer)
        for block, g in layer.gradients(weight_decay):
            total.add(block, g.square())
        total.settle()
        for block, g in layer.gradients(weight_decay):
            s = total.read(block, g.square())
            update = safe_divide(g, s.sqrt().add_(eps), s)
            layer.apply(block, precondition(layer, block, update), lr)
        total.commit()
