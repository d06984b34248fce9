"""The converted optimizers: a class for each that has an update rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Adagrad, Optimizer

from lightning_sketch.layers.step_count import step_tensor
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.stock import stock_optimizer
from lightning_sketch.rules.families import FAMILIES


class CompressedAdagrad(CompressedOptimizer):
    """``torch.optim.Adagrad`` with compressed states.

    Not a subclass of it, alone of all: DeepSpeed silently replaces every instance of Adagrad by a plain one of its own.
    """

    stock, rule = Adagrad, FAMILIES[Adagrad]
    _init_group = Adagrad._init_group  # which the stock step calls

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What the stock method does; its call of super() wants an instance.
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in (("foreach", None), ("maximize", False), ("differentiable", False), ("fused", None)):
                group.setdefault(name, default)
        for values in self.state.values():
            if values and not isinstance(values["step"], Tensor):
                values["step"] = step_tensor(values["step"])

    def share_memory(self) -> None:
        """Move the states of all layers, whatever form they have, into shared memory, as the stock method does."""
        for values in self.state.values():
            for name, value in values.items():
                if isinstance(value, Tensor) and name != "step":
                    value.share_memory_()  # type: ignore[no-untyped-call]


def _converted(stock: type[Optimizer]) -> type[CompressedOptimizer]:
    name = f"Compressed{stock.__name__}"
    doc = f"``torch.optim.{stock.__name__}`` with compressed states."
    body = {"stock": stock, "rule": FAMILIES[stock], "__module__": __name__, "__qualname__": name, "__doc__": doc}
    return type(name, (CompressedOptimizer, stock), body)


_OWN: dict[type[Optimizer], type[CompressedOptimizer]] = {Adagrad: CompressedAdagrad}
#: By the class that they are converted from.
COMPRESSED = {stock: _OWN.get(stock) or _converted(stock) for stock in FAMILIES}
globals().update({cls.__qualname__: cls for cls in COMPRESSED.values()})  # pickles name them


def compressed_class(optimizer: Optimizer) -> type[CompressedOptimizer]:
    """The class that `optimizer` is converted to, or already has; of one without a rule its own step is used."""
    if isinstance(optimizer, CompressedOptimizer):
        return type(optimizer)
    return COMPRESSED.get(type(optimizer)) or stock_optimizer(type(optimizer))
