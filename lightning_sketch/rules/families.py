"""The optimizers that have an update rule: one entry for each."""

from __future__ import annotations

from typing import ClassVar

from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from lightning_sketch.rules.adagrad import AdagradRule
from lightning_sketch.rules.adam import AdamRule, AdamWRule, SparseAdamRule
from lightning_sketch.rules.base import UpdateRule
from lightning_sketch.rules.rmsprop import RMSpropRule
from lightning_sketch.rules.sgd import SGDRule
from lightning_sketch.rules.stock import StockRule

#: By class of torch's. Exactly these: a subclass may update parameters in ways that we would not reproduce.
FAMILIES: dict[type[Optimizer], UpdateRule] = {
    Adam: AdamRule(),
    AdamW: AdamWRule(),
    SparseAdam: SparseAdamRule(),
    Adagrad: AdagradRule(),
    RMSprop: RMSpropRule(),
    SGD: SGDRule(),
}


class Converted(Optimizer):
    """What all converted optimizers are.

    Attributes:
        stock: the class that was converted.
        rule: how its layers are stepped.
    """

    stock: ClassVar[type[Optimizer]]
    rule: ClassVar[UpdateRule]


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The update rule of an optimizer, converted or not."""
    if isinstance(optimizer, Converted):
        return optimizer.rule
    return FAMILIES.get(type(optimizer)) or StockRule(optimizer)
