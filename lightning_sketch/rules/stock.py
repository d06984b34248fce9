"""What is known of an optimizer class without an update rule: its states, learned from itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_sketch.codecs import Codec
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.rules import Count, LayerStep, StateDef, UpdateRule
from lightning_sketch.rules.stock_probe import Learned, learn, stock_class
from lightning_sketch.sharding import global_shape


class StockRule(UpdateRule):
    """The "rule" of an optimizer whose own step updates compressed layers, too.

    Args:
        optimizer: whose class, options and attributes decide which states there are.
    """

    name: ClassVar[str] = "stock"
    refused_flags: ClassVar[tuple[str, ...]] = (*UpdateRule.refused_flags, "capturable")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._learned: dict[Any, Learned] = {}

    def states(self, group: Mapping[str, Any]) -> Sequence[StateDef]:
        """States of any parameter of the group."""
        every = {state.name: state for param in group["params"] for state in self.states_of(group, param)}
        return tuple(every.values())

    def states_of(self, group: Mapping[str, Any], param: Tensor) -> Sequence[StateDef]:
        return self._of(group, param).states

    def stock_count(self, group: Mapping[str, Any], param: Tensor) -> Count | None:
        return self._of(group, param).count

    def check_codecs(self, fqn: str, codecs: Mapping[str, Codec]) -> None:
        """Refuse codecs that are not element-wise.

        Raises:
            ValueError: one is not; says which could be used.
        """
        for state, codec in codecs.items():
            if not codec.elementwise:
                name = stock_class(self._optimizer).__name__
                raise ValueError(
                    f"{type(codec).__name__} cannot hold {state} of {fqn}: there is no update rule for {name}, so its "
                    "own step works on decoded states, and those must be stored element by element: use BFloat16(), "
                    "Quantized(), or Keep() (leave the state out of the rule)"
                )

    def numbers(self, group: Mapping[str, Any], step: int | Tensor) -> Any:
        raise NotImplementedError  # steps of such optimizers do not come by rules

    def reference(self, layer: LayerStep) -> None:
        raise NotImplementedError

    def fuse(self, layer: LayerStep) -> FusedStep:
        raise NotImplementedError

    def fusable(self, states: Any) -> bool:
        return False

    def _of(self, group: Mapping[str, Any], param: Tensor) -> Learned:
        # By what decides which states there are; not by what schedulers change.
        options = [(k, v) for k, v in group.items() if isinstance(v, bool | str | None) or k == "momentum"]
        key = repr(options), tuple(min(n, 256) for n in global_shape(param)), param.dtype, param.device
        if key not in self._learned:
            self._learned[key] = learn(self._optimizer, group, param)
        return self._learned[key]
