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
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_sketch.codecs import CodecState
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.rules.base import (
    StateDef,
    UpdateRule,
    add_moments,
    begin_momentum,
    bounded,
    learning_rate,
    moment_bound,
    precondition,
    read_second,
    safe_divide,
)
from lightning_sketch.rules.layer_step import LayerStep


class AdamRule(UpdateRule):
    """Adam; AdamW through the group's ``decoupled_weight_decay``."""

    name: ClassVar[str] = "adam"
    refused_flags: ClassVar[tuple[str, ...]] = (*UpdateRule.refused_flags, "amsgrad")
    torch_takes_sparse: ClassVar[bool] = False
    decoupled: ClassVar[bool] = False
    #: Whether eps is added before the bias correction of the second moment, as ``torch.optim.SparseAdam`` does.
    early_eps: ClassVar[bool] = False

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        return (StateDef("exp_avg", signed=True), StateDef("exp_avg_sq", signed=False))

    def kept_states(self, group: Mapping[str, Any], param: Tensor) -> Sequence[StateDef]:
        largest = (StateDef("max_exp_avg_sq", signed=False),) if group.get("amsgrad") else ()
        return (*self.states(group), *largest)

    def reference(self, layer: LayerStep) -> Tensor | None:
        numbers: _Hyperparameters = layer.numbers
        exp_avg, exp_avg_sq = self._begin(layer)
        bound = moment_bound(exp_avg, numbers.beta1, numbers.beta2)
        left_out = layer.observe(exp_avg, exp_avg_sq, weight_decay=numbers.weight_decay)
        add_moments(layer, exp_avg_sq, exp_avg, numbers.weight_decay)
        for block, g in layer.gradients(numbers.weight_decay):
            m = g if exp_avg is None else exp_avg.read(block, g)
            v = read_second(exp_avg_sq, block, g)
            update = safe_divide(bounded(m, v, bound), v.sqrt().div_(numbers.root_correction).add_(numbers.eps), v)
            layer.apply(block, precondition(layer, block, update), numbers.rate(exp_avg), numbers.decay_factor)
            del m, v, update  # else they would be held while the next block's are made
        if exp_avg is not None:
            exp_avg.commit()
        exp_avg_sq.commit()
        return left_out

    def advance(self, layer: LayerStep) -> None:
        exp_avg, exp_avg_sq = self._begin(layer)
        add_moments(layer, exp_avg_sq, exp_avg, layer.numbers.weight_decay)

    def fuse(self, layer: LayerStep) -> FusedStep:
        numbers: _Hyperparameters = layer.numbers
        exp_avg, _ = self._begin(layer)
        return layer.fuse(
            "exp_avg_sq",
            "exp_avg",
            lr=numbers.rate(exp_avg),
            decay_factor=numbers.decay_factor,
            eps=numbers.eps,
            weight_decay=numbers.weight_decay,
            correction=numbers.correction,
            bound=moment_bound(exp_avg, numbers.beta1, numbers.beta2),
        )

    def _begin(self, layer: LayerStep) -> tuple[CodecState | None, CodecState]:
        numbers: _Hyperparameters = layer.numbers
        exp_avg = layer.begin("exp_avg", decay=numbers.beta1, weight=1 - numbers.beta1)
        exp_avg_sq = layer.begin("exp_avg_sq", decay=numbers.beta2, weight=1 - numbers.beta2)
        assert exp_avg_sq is not None  # `Drop` refuses second moments
        begin_momentum(layer)
        return exp_avg, exp_avg_sq

    def coupled_weight_decay(self, group: Mapping[str, Any]) -> float:
        return 0.0 if self._decoupled(group) else super().coupled_weight_decay(group)

    def numbers(self, group: Mapping[str, Any], step: int | Tensor) -> _Hyperparameters:
        beta1, beta2 = map(float, group["betas"])
        lr, eps, weight_decay = learning_rate(group, step), float(group["eps"]), float(group.get("weight_decay", 0.0))
        decoupled = self._decoupled(group)
        root_correction = (1 - beta2**step) ** 0.5
        return _Hyperparameters(
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            corrected_lr=lr / (1 - beta1**step),
            eps=eps / root_correction if self.early_eps else eps,
            weight_decay=self.coupled_weight_decay(group),
            decay_factor=1 - lr * weight_decay if decoupled else 1.0,
            root_correction=root_correction,
            correction=1 / root_correction,
        )

    def _decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", self.decoupled))


@dataclass(slots=True)
class _Hyperparameters:
    """Hyperparameters of one step.

    Args:
        beta1, beta2: as in torch.
        lr: as in torch.
        corrected_lr: lr divided by the first moment's bias correction.
        eps: as it is added to the corrected root.
        weight_decay: the coupled one.
        decay_factor: factor of the parameter, for decoupled weight decay.
        root_correction: the root of the second moment's bias correction, a divisor.
        correction: one over that.
    """

    beta1: float
    beta2: float
    lr: float | Tensor
    corrected_lr: float | Tensor
    eps: float | Tensor
    weight_decay: float
    decay_factor: float | Tensor
    root_correction: float | Tensor
    correction: float | Tensor

    def rate(self, exp_avg: CodecState | None) -> float | Tensor:
        """Learning rate, with the first moment's bias correction where there is one."""
        return self.lr if exp_avg is None else self.corrected_lr


class AdamWRule(AdamRule):
    """AdamW in torch versions whose groups do not say ``decoupled_weight_decay``."""

    name: ClassVar[str] = "adamw"
    decoupled: ClassVar[bool] = True


class SparseAdamRule(AdamRule):
    """SparseAdam: no weight decay, and the larger eps of the paper's more efficient form (its section 2)."""

    name: ClassVar[str] = "sparse_adam"
    torch_takes_sparse: ClassVar[bool] = True
    early_eps: ClassVar[bool] = True
