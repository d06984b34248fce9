"""The optimizers of the two tables in :mod:`benchmarks.sparse_lm`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer, SparseAdam

BETA2 = 0.999


@dataclass(frozen=True)
class Method:
    """An optimizer of the tables: a stock class and how its states are stored."""

    label: str
    family: Literal["adam", "adagrad"]
    second: Callable[[], Any] | None = None  # makes the second moment's codec; None: exact
    first: Callable[[], Any] | None = None  # the first moment's; None: exact
    momentum: bool = True  # beta1 = 0.9; False: 0, with the stock class

    @property
    def compressed(self) -> bool:
        return self.second is not None or self.first is not None


def build(method: Method, model: nn.Module, layers: list[nn.Embedding], *, lr: float, eps: float) -> Optimizer:
    """The optimizer of the layers' tables, compressed as the method says."""
    tables = [layer.weight for layer in layers]
    optimizer: Optimizer
    if method.family == "adagrad":
        optimizer = Adagrad(tables, lr=lr, eps=eps)
    else:
        optimizer = SparseAdam(tables, lr=lr, eps=eps, betas=(0.9 if method.momentum else 0.0, BETA2))
    if not method.compressed:
        return optimizer

    import lightning_sketch as ls

    codecs: dict[str, Any] = {}
    if method.second is not None:
        codecs["second_moment"] = method.second()
    if method.first is not None:
        codecs["first_moment"] = method.first()
    return ls.compress(optimizer, model, ls.Policy([ls.Rule(role="embedding", **codecs)]))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors but the step counters."""
    return sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
        for tensor in tensors_of(value)
    )


def tensors_of(value: Any) -> list[Tensor]:
    """Those that an entry of a state is, or is made of, as torchao's are; none of what is no tensor."""
    if hasattr(value, "__tensor_flatten__"):
        return [tensor for name in value.__tensor_flatten__()[0] for tensor in tensors_of(getattr(value, name))]
    return [value] if torch.is_tensor(value) else []


def _codec(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import lightning_sketch as ls

        return getattr(ls, name)(**options)

    return make


def _sketch(compression: int, *, depth: int = 3, update: str = "linear") -> Callable[[], Any]:
    return _codec("CountSketch", compression=compression, depth=depth, update=update)


def _hot_rows(compression: int) -> Callable[[], Any]:
    def make() -> Any:
        from benchmarks.hot_rows import HotRows

        return HotRows(compression)

    return make


_DROP = _codec("Drop")

METHODS: dict[str, Method] = {
    "adam": Method("SparseAdam, exact", "adam"),
    "adam_b0": Method("SparseAdam, exact, beta1 = 0", "adam", momentum=False),
    "adagrad": Method("Adagrad, exact", "adagrad"),
    "cs20": Method("CountSketch 20x, no first moment", "adam", _sketch(20), _DROP),
    "rw_10": Method("RowWise in a 10x sketch, no first moment", "adam", _codec("RowWise", compression=10), _DROP),
    "rw_100": Method("RowWise in a 100x sketch, no first moment", "adam", _codec("RowWise", compression=100), _DROP),
    "rw": Method("RowWise, no first moment", "adam", _codec("RowWise"), _DROP),
    "factored": Method("Factored, no first moment", "adam", _codec("Factored"), _DROP),
    "paper5_both": Method(
        "CountSketch 5x of both moments, the paper's rule",
        "adam",
        _sketch(5, update="paper"),
        _sketch(5, update="paper"),
    ),
    "paper20": Method("CountSketch 20x, the paper's rule, no first moment", "adam", _sketch(20, update="paper"), _DROP),
    "sm3": Method("SM3-II (EMA), no first moment", "adam", _codec("SM3", variant="II"), _DROP),
    "cs5_both": Method("CountSketch 5x of both moments", "adam", _sketch(5), _sketch(5)),
    "bf16_both": Method("BFloat16 of both moments", "adam", _codec("BFloat16"), _codec("BFloat16")),
    "8bit_both": Method("8 bits of both moments", "adam", _codec("Quantized", bits=8), _codec("Quantized", bits=8)),
    "4bit_both": Method("4 bits of both moments", "adam", _codec("Quantized", bits=4), _codec("Quantized", bits=4)),
    "8bit_factored": Method(
        "Factored, first moment in 8 bits", "adam", _codec("Factored"), _codec("Quantized", bits=8)
    ),
    "bf16_factored": Method("Factored, first moment BFloat16", "adam", _codec("Factored"), _codec("BFloat16")),
    "8bit_rw": Method("RowWise, first moment in 8 bits", "adam", _codec("RowWise"), _codec("Quantized", bits=8)),
    "bf16_rw": Method("RowWise, first moment BFloat16", "adam", _codec("RowWise"), _codec("BFloat16")),
    "cs5": Method("CountSketch 5x, no first moment", "adam", _sketch(5), _DROP),
    "cs100": Method("CountSketch 100x, no first moment", "adam", _sketch(100), _DROP),
    "cs20_d1": Method("CountSketch 20x, depth 1, no first moment", "adam", _sketch(20, depth=1), _DROP),
    "cs20_both": Method("CountSketch 20x of both moments", "adam", _sketch(20), _sketch(20)),
    "cs100_both": Method("CountSketch 100x of both moments", "adam", _sketch(100), _sketch(100)),
    "adagrad_rw": Method("Adagrad, RowWise", "adagrad", _codec("RowWise")),
    "adagrad_cs5": Method("Adagrad, CountSketch 5x", "adagrad", _sketch(5)),
    "adagrad_cs20": Method("Adagrad, CountSketch 20x", "adagrad", _sketch(20)),
    "adagrad_cs100": Method("Adagrad, CountSketch 100x", "adagrad", _sketch(100)),
    "adagrad_sm3": Method("Adagrad, SM3-II", "adagrad", _codec("SM3", variant="II")),
    "rw_20": Method("RowWise in a 20x sketch, no first moment", "adam", _codec("RowWise", compression=20), _DROP),
    "rw_5": Method("RowWise in a 5x sketch, no first moment", "adam", _codec("RowWise", compression=5), _DROP),
    "floored": Method("Factored(floor=1), no first moment", "adam", _codec("Factored", floor=1.0), _DROP),
    "floored_less": Method("Factored(floor=0.3), no first moment", "adam", _codec("Factored", floor=0.3), _DROP),
    "floored_more": Method("Factored(floor=3), no first moment", "adam", _codec("Factored", floor=3.0), _DROP),
    "adagrad_floored": Method("Adagrad, Factored(floor=1)", "adagrad", _codec("Factored", floor=1.0)),
    # Not in the package: an upper bound of what finding hot rows online could give.
    "hot20": Method("hot rows exact, known in advance, 20x, no first moment", "adam", _hot_rows(20), _DROP),
    "hot100": Method("hot rows exact, known in advance, 100x, no first moment", "adam", _hot_rows(100), _DROP),
}
