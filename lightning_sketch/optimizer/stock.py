"""The converted classes of optimizers without an update rule, made when they are first asked for."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cached_property
from typing import Any, NoReturn

from torch.optim import Optimizer

from lightning_sketch.kernels.capture import capturing
from lightning_sketch.layers.stock_states import encode_entry, stored_step
from lightning_sketch.optimizer import stock_step
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.stock_layers import step
from lightning_sketch.rules.stock import StockRule
from lightning_sketch.rules.stock_probe import steps_apart


class StockOptimizer(CompressedOptimizer):
    """An optimizer whose own step updates compressed layers, too: decoded for it, and encoded again.

    Of its own step it keeps everything: hooks, closures, and what it does about gradients that are not finite.
    """

    @cached_property
    def rule(self) -> StockRule:  # type: ignore[override]
        return StockRule(self)

    @cached_property
    def steps_apart(self) -> bool:
        """Whether layers may be stepped a few at a time. Found out at the first step."""
        return steps_apart(self)

    @stock_step.with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step, by the optimizer's own class.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: DeepSpeed put tensors of its own in place of the parameters, or a graph is being captured.
            ValueError: a layer's shape changed, or its group's hyperparameters are not supported. Nothing was changed
                then.
        """
        if capturing() and self.compression.records:
            raise RuntimeError(
                f"a step of {self.stock.__name__} with compressed layers cannot be captured into a graph: they are "
                "decoded, stepped and encoded under numbers that the host counts. Adam, AdamW, RMSprop and SGD can be"
            )
        self._bind_if_flat()
        return step(self, closure, lambda: self.steps_apart)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        vars(self).pop("steps_apart", None)

    def encode_assigned(self) -> None:
        """Encode dense states that were assigned to compressed layers; see `assigned.encode_assigned`."""
        tensors = list(self.compressed_tensors())
        for _, _, (part, *_) in tensors:
            part.check_shape()
        for group, param, (part, *_) in tensors:
            if entry := self.state.get(param):
                encode_entry(part, param, group, entry, stored_step(entry))

    def forget_conversion(self) -> None:
        for name in ("rule", "steps_apart"):
            vars(self).pop(name, None)
        super().forget_conversion()

    def bind(self, wrapper: Any) -> NoReturn:
        """Refuse DeepSpeed's flat tensors.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(_FLAT.format(self.stock.__name__))

    def _bind_if_flat(self) -> bool:
        if any(map(self.is_flat, self.param_groups)) and self.compression.records:
            raise RuntimeError(_FLAT.format(self.stock.__name__))
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.stock,), self.__getstate__()  # the class is no attribute of a module


_FLAT = (
    "DeepSpeed joined the parameters into flat tensors, in which only optimizers with an update rule of ours can tell "
    "layers apart, and there is none for {}: train with Adam, AdamW, Adagrad, RMSprop or SGD, or do not compress it"
)


_made: dict[type[Optimizer], type[StockOptimizer]] = {}


def stock_optimizer(stock: type[Optimizer]) -> type[StockOptimizer]:
    """The class that optimizers of class `stock` are converted to."""
    if stock not in _made:

        def body(namespace: dict[str, Any]) -> None:
            namespace |= {"stock": stock, "__module__": __name__, "__doc__": f"``{stock.__name__}``, compressed."}

        metaclass = _OursFirst if type(stock) is type else type(_OursFirst.__name__, (_OursFirst, type(stock)), {})
        name, bases = f"Compressed{stock.__name__}", (stock, StockOptimizer)
        _made[stock] = types.new_class(name, bases, {"metaclass": metaclass}, body)
    return _made[stock]


class _OursFirst(type):
    """Classes that have our methods in front of the stock class's, which is nevertheless their first base.

    Python compares first bases when it is asked to change an object's class, and finds that those with ``ABC`` in front
    of ``Optimizer``, all of pytorch_optimizer's, are laid out differently from those without.
    """

    def mro(cls) -> list[type]:
        stock = vars(cls).get("stock")
        if stock is None:
            return list(super().mro())
        ours = StockOptimizer.__mro__
        return [cls, *ours[: ours.index(Optimizer)], *stock.__mro__]


def _new(stock: type[Optimizer]) -> StockOptimizer:
    cls = stock_optimizer(stock)
    made: StockOptimizer = cls.__new__(cls)
    return made
