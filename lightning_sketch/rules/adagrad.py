r"""Adagrad, and with the `SM3` codec the optimizer SM3.

.. math::
    s \leftarrow s + g^2, \quad \theta \leftarrow \theta - \frac{\eta}{1 + (t - 1) \gamma} \frac{g}{\sqrt{s} + \epsilon}

References:
    Duchi et al., *Adaptive subgradient methods*, JMLR 2011
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_sketch.codecs import CodecState
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.rules.base import (
    StateDef,
    UpdateRule,
    add_moments,
    begin_momentum,
    learning_rate,
    precondition,
    read_second,
    safe_divide,
)
from lightning_sketch.rules.layer_step import LayerStep


class AdagradRule(UpdateRule):
    """Adagrad with ``lr_decay`` (the gamma above) and ``initial_accumulator_value``."""

    name: ClassVar[str] = "adagrad"

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        return (StateDef("sum", signed=False),)

    def numbers(self, group: Mapping[str, Any], step: int | Tensor) -> tuple[float | Tensor, float, float]:
        """Learning rate, eps and weight decay."""
        lr = learning_rate(group, step) / (1 + (step - 1) * float(group["lr_decay"]))
        return lr, float(group["eps"]), float(group["weight_decay"])

    def reference(self, layer: LayerStep) -> Tensor | None:
        lr, eps, weight_decay = layer.numbers
        total = self._begin(layer)
        left_out = layer.observe(total, weight_decay=weight_decay)
        add_moments(layer, total, None, weight_decay)
        for block, g in layer.gradients(weight_decay):
            s = read_second(total, block, g)
            update = safe_divide(g, s.sqrt().add_(eps), s)
            layer.apply(block, precondition(layer, block, update), lr)
            del s, update  # else they would be held while the next block's are made
        total.commit()
        return left_out

    def advance(self, layer: LayerStep) -> None:
        add_moments(layer, self._begin(layer), None, layer.numbers[2])

    def fuse(self, layer: LayerStep) -> FusedStep:
        lr, eps, weight_decay = layer.numbers
        self._begin(layer)
        return layer.fuse("sum", None, lr=lr, eps=eps, weight_decay=weight_decay)

    def _begin(self, layer: LayerStep) -> CodecState:
        total = layer.begin("sum", decay=1.0, weight=1.0)
        assert total is not None  # `Drop` refuses second moments
        begin_momentum(layer)
        return total
