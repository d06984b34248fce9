r"""SGD with momentum.

.. math::
    b \leftarrow \mu b + (1 - \tau) g \quad (b = g \text{ at the first step}), \quad \theta \leftarrow \theta - \eta b

References:
    Sutskever et al., *On the importance of initialization and momentum in deep learning*, ICML 2013
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_sketch.codecs import CodecState
from lightning_sketch.kernels.fused import FusedStep
from lightning_sketch.rules.base import LayerStep, StateDef, UpdateRule


class SGDRule(UpdateRule):
    """SGD; ``nesterov`` and ``dampening`` (the tau above) as in torch. Without momentum there is no state."""

    name: ClassVar[str] = "sgd"

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        return (StateDef("momentum_buffer", signed=True),) if group["momentum"] else ()

    def reference(self, layer: LayerStep) -> None:
        group = layer.group
        lr, momentum, weight_decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
        nesterov = bool(group["nesterov"])

        buffer = self._begin(layer)
        if buffer is not None:
            for block, g in layer.gradients(weight_decay):
                buffer.add(block, g)
            buffer.settle()
        for block, g in layer.gradients(weight_decay):
            update = g
            if buffer is not None:
                b = buffer.read(block, g)
                update = g.add(b, alpha=momentum) if nesterov else b
            layer.apply(block, update, lr)
        if buffer is not None:
            buffer.commit()

    def fuse(self, layer: LayerStep) -> FusedStep:
        group = layer.group
        self._begin(layer)
        return layer.fuse(
            None,
            "momentum_buffer",
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=float(group["momentum"]) if group["nesterov"] and "momentum_buffer" in layer.states else 0.0,
        )

    def _begin(self, layer: LayerStep) -> CodecState | None:
        group = layer.group
        weight = 1.0 if layer.step == 1 else 1 - float(group["dampening"])
        return layer.begin("momentum_buffer", decay=float(group["momentum"]), weight=weight)
