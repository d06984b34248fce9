r"""SGD with momentum.

.. math::
    b \leftarrow \mu b + (1 - \tau) g \quad (b = g \text{ at the first step}), \quad \theta \leftarrow \theta - \eta b

References:
    Sutskever et al., *On the importance of initialization and momentum in deep learning*, ICML 2013
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_sketch.codecs import CodecState
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.rules.base import StateDef, UpdateRule, learning_rate
from lightning_sketch.rules.layer_step import LayerStep


class SGDRule(UpdateRule):
    """SGD; ``nesterov`` and ``dampening`` (the tau above) as in torch. Without momentum there is no state."""

    name: ClassVar[str] = "sgd"

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        return (StateDef("momentum_buffer", signed=True),) if group["momentum"] else ()

    def numbers(self, group: Mapping[str, Any], step: int | Tensor) -> _Hyperparameters:
        weight: float | Tensor = 1 - float(group["dampening"])
        if isinstance(step, Tensor):
            weight = step.where(step == 1, weight)
        elif step == 1:
            weight = 1.0
        return _Hyperparameters(
            lr=learning_rate(group, step),
            momentum=float(group["momentum"]),
            weight=weight,
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
        )

    def reference(self, layer: LayerStep) -> Tensor | None:
        numbers: _Hyperparameters = layer.numbers
        buffer = self._begin(layer)
        left_out = layer.observe(buffer)
        if buffer is not None:
            for block, g in layer.gradients(numbers.weight_decay):
                buffer.add(block, g)
            buffer.settle()
        for block, g in layer.gradients(numbers.weight_decay):
            update = g if buffer is None else buffer.read(block, g)
            if buffer is not None and numbers.nesterov:
                update = g.add(update, alpha=numbers.momentum)
            layer.apply(block, update, numbers.lr)
            del update  # else it would be held while the next block's is made
        if buffer is not None:
            buffer.commit()
        return left_out

    def fuse(self, layer: LayerStep) -> FusedStep:
        numbers: _Hyperparameters = layer.numbers
        buffer = self._begin(layer)
        return layer.fuse(
            None,
            None if buffer is None else "momentum_buffer",
            lr=numbers.lr,
            weight_decay=numbers.weight_decay,
            nesterov=numbers.momentum if numbers.nesterov and buffer is not None else 0.0,
        )

    def _begin(self, layer: LayerStep) -> CodecState | None:
        numbers: _Hyperparameters = layer.numbers
        if not numbers.momentum:  # set to 0 in the middle of training: the buffer stays as it is, as torch's does
            return None
        return layer.begin("momentum_buffer", decay=numbers.momentum, weight=numbers.weight)


@dataclass(slots=True)
class _Hyperparameters:
    """Hyperparameters of one step.

    Args:
        lr, momentum, weight_decay, nesterov: as in torch.
        weight: of the gradient in the buffer.
    """

    lr: float | Tensor
    momentum: float
    weight: float | Tensor
    weight_decay: float
    nesterov: bool
