"""A tiny model with one table, prescribed gradients, and every supported optimizer.

Gradients are prescribed, not computed, so what happens to one layer cannot reach another through the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Keep, Policy, Quantized, RowWise, Rule

#: A sketch wider than any table here stores every row exactly. Lazy, so that sparse gradients, too, are torch's.
EXACT = CountSketch(width=1 << 20, lazy=True)


class Tiny(nn.Module):
    """A table, which policies compress, and two kept parameters."""

    def __init__(self, rows: int = 30, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 4, dtype=dtype)
        self.kept = nn.Linear(4, 3, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.kept(self.table(tokens))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """One supported optimizer class."""

    cls: type[Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    sparse: bool = False  # SparseAdam takes nothing else

    def make(self, params: Iterable[Any], **kwargs: Any) -> Any:
        return self.cls(params, **self.kwargs | kwargs)  # type: ignore[call-arg]

    def __str__(self) -> str:
        return self.cls.__name__


ADAM = Case(Adam, {"lr": 0.05, "weight_decay": 0.1})
ADAMW = Case(AdamW, {"lr": 0.05, "weight_decay": 0.1})
CASES = (
    ADAM, ADAMW, Case(SparseAdam, {"lr": 0.05}, sparse=True), Case(Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    Case(RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}), Case(SGD, {"lr": 0.1, "momentum": 0.9}),
)  # fmt: skip

#: Codecs of both moments, one of every kind. Of SGD, which has no second moment, only those named in FOR_SGD.
CODECS: dict[str, dict[str, Any]] = {
    "sketch": {"first_moment": CountSketch(compression=2), "second_moment": CountSketch(compression=2)},
    "paper": {"first_moment": CountSketch(2, update="paper"), "second_moment": CountSketch(2, update="paper")},
    "exact": {"first_moment": EXACT, "second_moment": EXACT},
    "bfloat16": {"first_moment": BFloat16(), "second_moment": BFloat16()},
    "quantized": {"first_moment": Quantized(), "second_moment": Quantized(bits=4)},
    "rows": {"first_moment": Drop(), "second_moment": RowWise()},
    "sketched rows": {"first_moment": Keep(), "second_moment": RowWise(compression=4)},
    "factored": {"first_moment": BFloat16(), "second_moment": Factored()},
    "SM3": {"first_moment": Keep(), "second_moment": SM3()},
    "SM3-I momentum": {"first_moment": Drop(), "second_moment": SM3("I", momentum=0.9)},
}
FOR_SGD = ("sketch", "paper", "exact", "bfloat16", "quantized", "rows")

#: Every codec under one optimizer, and every optimizer under one codec.
EVERY = (*((ADAM, name) for name in CODECS), *((case, "sketch") for case in CASES if case is not ADAM))


def on_table(**codecs: Any) -> Policy:
    """Compress `Tiny`'s table only."""
    return Policy([Rule(role="embedding", **codecs)])


LOSSY, EXACTLY = on_table(**CODECS["sketch"]), on_table(**CODECS["exact"])


def give_gradients(model: nn.Module, step: int, *, sparse: bool = False) -> None:
    """Set every parameter's gradient from (step, position). A sparse one has a duplicate and misses most rows."""
    for position, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + position)
        if sparse:
            ids = torch.randint(0, len(param), (4,), generator=generator)
            ids[1] = ids[0]
            values = torch.randn(4, *param.shape[1:], generator=generator)
            param.grad = torch.sparse_coo_tensor(ids[None], values.to(param.dtype), param.shape, check_invariants=True)
        else:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(model: nn.Module, optimizer: Any, steps: Iterable[int], *, sparse: bool = False) -> None:
    for step in steps:
        give_gradients(model, step, sparse=sparse)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Copies of all parameters and states, by parameter name."""
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        found[name] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}.{key}"] = value.clone() if isinstance(value, Tensor) else value
    return found


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Bit for bit, types and dtypes included; dictionaries and lists of anything."""
    assert type(found) is type(expected), f"{path}: {type(found)}, expected {type(expected)}"
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), path
        for key in found:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), path
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    elif isinstance(found, Tensor):
        assert found.dtype == expected.dtype, path
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{path}: {m}")
    else:
        assert found == expected, path


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have torch make tensors of that dtype where none is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
