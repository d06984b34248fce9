r"""Adam, AdamW and SparseAdam.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
    \theta \leftarrow \theta - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

Under sparse gradients only touched rows of the parameter move, as in ``torch.optim.SparseAdam``; weight decay, too, is
applied to touched rows only. `t` counts the layer's steps, so a row that first appears late is corrected as little as
in torch.

References:
    Kingma and Ba, *Adam*, ICLR 2015, https://arxiv.org/abs/1412.6980
    Loshchilov and Hutter, *Decoupled weight decay regularization*, ICLR 2019, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_sketch.rules.base import (
    LayerStep,
    StateDef,
    UpdateRule,
    begin_momentum,
    bounded_first_moment,
    precondition,
    safe_divide,
)


class AdamRule(UpdateRule):
    """Adam; AdamW through the group's ``decoupled_weight_decay``."""

    name: ClassVar[str] = "adam"
    refused_flags: ClassVar[tuple[str, ...]] = (*UpdateRule.refused_flags, "amsgrad")
    decoupled: ClassVar[bool] = False
    #: Whether eps is added before the bias correction of the second moment, as ``torch.optim.SparseAdam`` does.
    early_eps: ClassVar[bool] = False

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        return (StateDef("exp_avg", signed=True), StateDef("exp_avg_sq", signed=False))

    def reference(self, layer: LayerStep) -> None:
        group, t = layer.group, layer.step
        beta1, beta2 = (float(beta) for beta in group["betas"])
        lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group.get("weight_decay", 0.0))
        decoupled = group.get("decoupled_weight_decay", self.decoupled)
        coupled = 0.0 if decoupled else weight_decay
        shrink = 1 - lr * weight_decay if decoupled else 1.0

        exp_avg = layer.begin("exp_avg", decay=beta1, weight=1 - beta1)
        exp_avg_sq = layer.begin("exp_avg_sq", decay=beta2, weight=1 - beta2)
        assert exp_avg_sq is not None  # `Drop` refuses second moments
        begin_momentum(layer)
        for block, g in layer.gradients(coupled):
            if exp_avg is not None:
                exp_avg.add(block, g)
            exp_avg_sq.add(block, g.square())
        if exp_avg is not None:
            exp_avg.settle()
        exp_avg_sq.settle()

        step_size = lr if exp_avg is None else lr / (1 - beta1**t)
        correction = (1 - beta2**t) ** 0.5
        if self.early_eps:
            eps /= correction
        for block, g in layer.gradients(coupled):
            m = g if exp_avg is None else exp_avg.read(block, g)
            v = exp_avg_sq.read(block, g.square())
            if exp_avg is not None and exp_avg.mixes_rows:
                m = bounded_first_moment(m, v, beta1, beta2)
            update = safe_divide(m, v.sqrt().div_(correction).add_(eps), v)
            layer.apply(block, precondition(layer, block, update), step_size, shrink)
        if exp_avg is not None:
            exp_avg.commit()
        exp_avg_sq.commit()


class AdamWRule(AdamRule):
    """AdamW in torch versions whose groups do not say ``decoupled_weight_decay``."""

    name: ClassVar[str] = "adamw"
    decoupled: ClassVar[bool] = True


class SparseAdamRule(AdamRule):
    """SparseAdam: no weight decay, and the larger eps of the paper's more efficient form (its section 2)."""

    name: ClassVar[str] = "sparse_adam"
    early_eps: ClassVar[bool] = True
