"""One converted optimizer of one layer, trained by the reference or by fused kernels."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from lightning_sketch import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
    kernels,
)
from lightning_sketch.kernels import native

RULES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "sparse_adam": (SparseAdam, {"lr": 0.01}),
    "adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.01}),
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}
SECOND: dict[str, Codec] = {
    "RowWise": RowWise(),
    "RowWise sketched": RowWise(compression=4),
    "RowWise lazy": RowWise(lazy=True),
    "SM3": SM3(),
    "Factored": Factored(floor=2.0),  # without it in tests/conformance
    "CountSketch": CountSketch(compression=4),
    "CountSketch, depth 1": CountSketch(compression=4, depth=1),
    "CountSketch, depth 2": CountSketch(compression=4, depth=2),
    "CountSketch, lazy": CountSketch(compression=4, lazy=True),
    "CountSketch, wide": CountSketch(width=10_000),
    "BFloat16": BFloat16(),
    "BFloat16, nearest": BFloat16(stochastic=False),
    "Keep": Keep(),
}
FIRST: dict[str, Codec] = {
    "Drop": Drop(),
    "BFloat16": BFloat16(),
    "BFloat16, nearest": BFloat16(stochastic=False),
    "CountSketch": CountSketch(compression=4),
    "CountSketch, depth 4": CountSketch(compression=4, depth=4),
    "CountSketch, wide": CountSketch(width=10_000),
    "Keep": Keep(),
}


#: Of either moment; tested with Triton's kernels by triton_quantized.py.
QUANTIZED: dict[str, Codec] = {"Quantized": Quantized(), "Quantized, 4 bits": Quantized(bits=4, block=32)}


def pairs(seconds: dict[str, Codec], firsts: dict[str, Codec]) -> list[Any]:
    """Every pair of codecs that has something to compress."""
    return [pytest.param(second, first, id=f"{s}-{f}") for (s, second), (f, first) in itertools.product(
        seconds.items(), firsts.items()) if not s == f == "Keep"]  # fmt: skip


PAIRS = pairs(SECOND, FIRST)

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
#: Units in the last place of the largest element: rounding in another order (sums of a row), three steps.
ULPS = 16


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    rule: str
    second: Codec
    first: Codec
    rows: int
    columns: int
    sparse: bool = False
    dtype: torch.dtype = torch.float32
    steps: int = 3
    device: str = "cpu"


def start(case: Case) -> tuple[nn.Embedding, Any, torch.Generator]:
    """A layer, its converted optimizer, and where its gradients come from."""
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.columns)
    layer = nn.Embedding(case.rows, case.columns, sparse=case.sparse, dtype=case.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    layer.to(case.device)
    cls, options = RULES[case.rule]
    optimizer = cls(layer.parameters(), **options)
    moments = {"first_moment": case.first} if case.rule in ("sgd", "nesterov") else _moments(case)
    return layer, compress(optimizer, layer, Policy([Rule(name="*", **moments)])), generator


def train(case: Case) -> dict[str, Tensor | float]:
    """The parameter after training, and its states."""
    layer, optimizer, generator = start(case)
    for _ in range(case.steps):
        layer.weight.grad = gradient(case, generator)
        optimizer.step()
    return {"weight": layer.weight.detach()} | dict(optimizer.state[layer.weight])


def unraised(case: Case) -> list[str]:
    """What autograd is not told of when a step changes it: names of the parameter and states, after the first step."""
    layer, optimizer, generator = start(case)
    layer.weight.grad = gradient(case, generator)
    optimizer.step()
    tensors = {"weight": layer.weight} | {k: v for k, v in optimizer.state[layer.weight].items() if torch.is_tensor(v)}
    before = {name: (tensor._version, tensor.clone()) for name, tensor in tensors.items()}
    optimizer.step()
    assert all(optimizer.state[layer.weight][name] is tensor for name, tensor in tensors.items() if name != "weight")
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name][1])}
    assert changed >= {"weight", "step"}
    return [name for name in changed if tensors[name]._version <= before[name][0]]


def _moments(case: Case) -> dict[str, Codec]:
    return {"second_moment": case.second} | (
        {} if case.rule in ("adagrad", "rmsprop") else {"first_moment": case.first}
    )


def gradient(case: Case, generator: torch.Generator) -> Tensor:
    """The next one."""
    if not case.sparse:
        return torch.randn(case.rows, case.columns, generator=generator).to(case.device, case.dtype)
    touched = torch.randint(0, case.rows, (max(1, case.rows // 2),), generator=generator)
    values = torch.randn(len(touched), case.columns, generator=generator).to(case.dtype)
    found = torch.sparse_coo_tensor(touched[None], values, (case.rows, case.columns), check_invariants=True)
    return found.to(case.device)


@contextmanager
def by_reference() -> Any:
    """Have every step done in plain PyTorch."""
    found = kernels.fused_kernel
    kernels.fused_kernel = lambda device: None  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.fused_kernel = found


@contextmanager
def by_isa(number: int) -> Any:
    """Have fused steps done by the kernels of one instruction set."""
    found = native.isa
    native.isa = lambda: number  # type: ignore[assignment]
    try:
        yield
    finally:
        native.isa = found


@contextmanager
def threads(count: int) -> Any:
    """Have torch, and the kernels with it, compute on so many threads."""
    found = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(found)


def check(case: Case) -> None:
    """Parameter and states are those of the reference."""
    found = {key: value.cpu() if torch.is_tensor(value) else value for key, value in train(case).items()}
    with by_reference():
        expected = train(replace(case, device="cpu"))
    assert_near(found, expected)


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """A parameter and its states are those of the reference, but for rounding in another order."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            assert found[key] == pytest.approx(value), key
            continue
        # A state in bfloat16 rounds to its other neighbour where an exact value differs in its last bit.
        halves = [t.dtype for t in expected.values() if isinstance(t, Tensor) and t.dtype == torch.bfloat16]
        tolerance = ULPS * ULP[torch.bfloat16 if halves else torch.float32]
        scale = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance * scale, msg=lambda m, k=key: f"{k}: {m}")
