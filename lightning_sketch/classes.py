"""The converted optimizers, one class for each of torch's, and what is inside a trainer's wrapper."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from lightning_sketch.counter import counter
from lightning_sketch.guard import inner_optimizers
from lightning_sketch.optimizer import CompressedOptimizer
from lightning_sketch.rules import AdagradRule, AdamRule, AdamWRule, RMSpropRule, SGDRule, SparseAdamRule, UpdateRule
from lightning_sketch.sharding.wrapper import wrapper_of
from lightning_sketch.stock.optimizer import stock_optimizer
from lightning_sketch.stock.rule import StockRule


class CompressedAdam(CompressedOptimizer, Adam):
    """``torch.optim.Adam`` with compressed states."""

    stock, rule = Adam, AdamRule()


class CompressedAdamW(CompressedOptimizer, AdamW):
    """``torch.optim.AdamW`` with compressed states."""

    stock, rule = AdamW, AdamWRule()


class CompressedSparseAdam(CompressedOptimizer, SparseAdam):
    """``torch.optim.SparseAdam`` with compressed states."""

    stock, rule = SparseAdam, SparseAdamRule()


class CompressedAdagrad(CompressedOptimizer):
    """``torch.optim.Adagrad`` with compressed states.

    Not a subclass of it, alone of all: DeepSpeed silently replaces every instance of Adagrad by a plain one of its own.
    """

    stock, rule = Adagrad, AdagradRule()
    _init_group = Adagrad._init_group  # which the stock step calls

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What the stock method does; its call of super() wants an instance.
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in (("foreach", None), ("maximize", False), ("differentiable", False), ("fused", None)):
                group.setdefault(name, default)
        for values in self.state.values():
            if values and not isinstance(values["step"], Tensor):
                values["step"] = counter(values["step"])

    def share_memory(self) -> None:
        """Move the states of all layers, whatever form they have, into shared memory, as the stock method does."""
        for values in self.state.values():
            for name, value in values.items():
                if isinstance(value, Tensor) and name != "step":
                    value.share_memory_()  # type: ignore[no-untyped-call]


class CompressedRMSprop(CompressedOptimizer, RMSprop):
    """``torch.optim.RMSprop`` with compressed states."""

    stock, rule = RMSprop, RMSpropRule()


class CompressedSGD(CompressedOptimizer, SGD):
    """``torch.optim.SGD`` with compressed states."""

    stock, rule = SGD, SGDRule()


COMPRESSED: dict[type[Optimizer], type[CompressedOptimizer]] = {
    cls.stock: cls
    for cls in (
        CompressedAdam, CompressedAdamW, CompressedSparseAdam, CompressedAdagrad, CompressedRMSprop, CompressedSGD
    )
}  # fmt: skip


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside an AcceleratedOptimizer, a LightningOptimizer, or what DeepSpeed makes of one.

    Or inside an optimizer of any other class that holds one over its own parameter groups, as SAM does.

    Raises:
        TypeError: it is no optimizer, or there are several inside.
    """
    found = wrapper_of(optimizer)  # is no Optimizer, and Accelerate's wrapper may hide it
    optimizer = optimizer if found is None else found
    while (inner := _inside(optimizer)) is not None:
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _inside(optimizer: Any) -> Optimizer | None:
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        return optimizer.optimizer  # type: ignore[no-any-return]
    if (
        not isinstance(optimizer, Optimizer)
        or type(optimizer) in COMPRESSED
        or isinstance(optimizer, CompressedOptimizer)
    ):
        return None
    own = {id(group) for group in getattr(optimizer, "param_groups", ())}
    held = {
        id(inner): (name, inner)
        for name, inner in inner_optimizers(optimizer)
        if any(id(group) in own for group in inner.param_groups)
    }
    if len(held) > 1:
        where = ", ".join(sorted(name for name, _ in held.values()))
        raise TypeError(f"{type(optimizer).__name__} holds several optimizers, in {where}; pass one of those")
    return next((inner for _, inner in held.values()), None)


def compressed_class(optimizer: Optimizer) -> type[CompressedOptimizer]:
    """The class that `optimizer` is converted to, or already has.

    Exactly torch's classes have our rules: a subclass may update parameters in ways that we would not reproduce, so its
    own step is used.
    """
    if isinstance(optimizer, CompressedOptimizer):
        return type(optimizer)
    return COMPRESSED.get(type(optimizer)) or stock_optimizer(type(optimizer))


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The update rule of an optimizer."""
    if isinstance(optimizer, CompressedOptimizer):
        return optimizer.rule
    return COMPRESSED[type(optimizer)].rule if type(optimizer) in COMPRESSED else StockRule(optimizer)
