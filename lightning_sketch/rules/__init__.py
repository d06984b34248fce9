"""Update rules: the mathematics of each optimizer, written once over codec states."""

from lightning_sketch.rules.adagrad import AdagradRule
from lightning_sketch.rules.adam import AdamRule, AdamWRule, SparseAdamRule
from lightning_sketch.rules.base import Count, StateDef, UpdateRule
from lightning_sketch.rules.layer_step import LayerStep
from lightning_sketch.rules.of_group import rule_of_group
from lightning_sketch.rules.rmsprop import RMSpropRule
from lightning_sketch.rules.run_layers import run
from lightning_sketch.rules.sgd import SGDRule

__all__ = [
    "AdagradRule",
    "AdamRule",
    "AdamWRule",
    "Count",
    "LayerStep",
    "RMSpropRule",
    "SGDRule",
    "SparseAdamRule",
    "StateDef",
    "UpdateRule",
    "rule_of_group",
    "run",
]
