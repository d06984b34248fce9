"""Which update rule a checkpoint's states belong to: it does not say which optimizer wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sketch.rules.adagrad import AdagradRule
from lightning_sketch.rules.adam import AdamRule, SparseAdamRule
from lightning_sketch.rules.base import UpdateRule
from lightning_sketch.rules.rmsprop import RMSpropRule
from lightning_sketch.rules.sgd import SGDRule


def rule_of_group(group: Mapping[str, Any]) -> UpdateRule:
    """The rule of the optimizer whose parameter groups have these options. Adam's is AdamW's, too.

    Raises:
        ValueError: no supported optimizer has such options.
    """
    own: dict[str, UpdateRule] = {  # options that no other optimizer of torch has
        "amsgrad": AdamRule(), "lr_decay": AdagradRule(), "centered": RMSpropRule(), "dampening": SGDRule(),
    }  # fmt: skip
    for option, rule in own.items():
        if option in group:
            return rule
    if "betas" in group and "weight_decay" not in group:
        return SparseAdamRule()
    options = ", ".join(sorted(map(str, group.keys() - {"params"}))) or "none"
    raise ValueError(
        "the checkpoint's parameter groups have the options of no optimizer that can be compressed (Adam, AdamW, "
        f"SparseAdam, Adagrad, RMSprop, SGD); they have {options}"
    )
