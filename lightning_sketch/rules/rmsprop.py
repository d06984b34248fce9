r"""RMSprop, centered or not, with momentum or not.

.. math::
    v \leftarrow \alpha v + (1 - \alpha) g^2, \quad \bar g \leftarrow \alpha \bar g + (1 - \alpha) g, \quad
    u = \frac{g}{\sqrt{v - \bar g^2} + \epsilon}, \quad b \leftarrow \mu b + u, \quad \theta \leftarrow \theta - \eta b

References:
    Tieleman and Hinton, *Lecture 6.5*, 2012; Graves, https://arxiv.org/abs/1308.0850 (centered)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_sketch.codecs import Codec, CodecState
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
from lightning_sketch.sharding import Block


class RMSpropRule(UpdateRule):
    """RMSprop. A dropped ``grad_avg`` is an uncentered layer, a dropped ``momentum_buffer`` one without momentum."""

    name: ClassVar[str] = "rmsprop"
    torch_takes_sparse: ClassVar[bool] = False

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        found = [StateDef("square_avg", signed=False)]
        if group["centered"]:
            found.append(StateDef("grad_avg", signed=True))
        if group["momentum"] > 0:
            found.append(StateDef("momentum_buffer", signed=True))
        return found

    def check_codecs(self, fqn: str, codecs: Mapping[str, Codec]) -> None:
        if getattr(codecs.get("momentum_buffer"), "sync", False):
            raise ValueError(
                f"{fqn}: RMSprop's momentum is of updates, which follow from the other states of the same step, so "
                "ranks cannot agree on it before; choose its codec without sync=True"
            )

    def numbers(
        self, group: Mapping[str, Any], step: int | Tensor
    ) -> tuple[float, bool, float, float | Tensor, float, float]:
        """alpha, whether centered, momentum, learning rate, eps and weight decay."""
        alpha, momentum, lr = float(group["alpha"]), float(group["momentum"]), learning_rate(group, step)
        return alpha, bool(group["centered"]), momentum, lr, float(group["eps"]), float(group["weight_decay"])

    def reference(self, layer: LayerStep) -> Tensor | None:
        alpha, centered, momentum, lr, eps, weight_decay = layer.numbers
        square_avg = layer.begin("square_avg", decay=alpha, weight=1 - alpha)
        assert square_avg is not None  # `Drop` refuses second moments
        # Switched off in the middle of training, these stay as they are, as torch's do.
        grad_avg = layer.begin("grad_avg", decay=alpha, weight=1 - alpha) if centered else None
        buffer = layer.begin("momentum_buffer", decay=momentum, weight=1.0) if momentum > 0 else None
        begin_momentum(layer)
        left_out = layer.observe(square_avg, grad_avg, buffer, weight_decay=weight_decay)
        add_moments(layer, square_avg, grad_avg, weight_decay)

        def preconditioned(block: Block, g: Tensor) -> Tensor:
            v = read_second(square_avg, block, g)
            if grad_avg is not None:
                v = _variance(v, grad_avg, block, g)
            return safe_divide(g, v.sqrt().add_(eps), v)

        if buffer is None:
            for block, g in layer.gradients(weight_decay):
                layer.apply(block, precondition(layer, block, preconditioned(block, g)), lr)
        elif buffer.reads_values:
            for block, g in layer.gradients(weight_decay):
                layer.apply(block, buffer.read(block, preconditioned(block, g)), lr)
            buffer.commit()
        else:
            # A sketched buffer shares storage between rows, so all rows go in before the first comes out.
            for block, g in layer.gradients(weight_decay):
                buffer.add(block, preconditioned(block, g))
            buffer.settle()
            for block, _ in layer.gradients():
                layer.apply(block, buffer.estimate(block), lr)
            buffer.commit()
        square_avg.commit()
        if grad_avg is not None:
            grad_avg.commit()
        return left_out

    def fusable(self, states: Collection[str]) -> bool:
        return set(states) == {"square_avg"}  # neither centered nor with momentum

    def fuse(self, layer: LayerStep) -> FusedStep:
        alpha, _, _, lr, eps, weight_decay = layer.numbers
        layer.begin("square_avg", decay=alpha, weight=1 - alpha)
        begin_momentum(layer)
        return layer.fuse("square_avg", None, lr=lr, eps=eps, weight_decay=weight_decay)


def _variance(v: Tensor, grad_avg: CodecState, block: Block, g: Tensor) -> Tensor:
    """``v - grad_avg**2``; where two approximations make that negative, `v` itself."""
    variance = v - grad_avg.read(block, g).square()
    return variance.where(variance > 0, v)
