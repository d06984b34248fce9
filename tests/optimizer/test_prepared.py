"""Layers that are stored alike follow one of them, and train bit for bit as each would by itself.

The oracle forgets everything before each step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_sketch import (
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
)
from lightning_sketch.kernels import native
from lightning_sketch.optimizer.prepared import Prepared
from tests.tiny import assert_same, snapshot

STEPS = 8
CODECS: dict[str, tuple[Codec, Codec]] = {
    "rows": (Drop(), RowWise()),
    "rows, sketched": (Keep(), RowWise(3)),
    "factored": (BFloat16(), Factored()),
    "bfloat16": (BFloat16(), BFloat16(stochastic=False)),
    "quantized": (Quantized(), Quantized(4)),
    "sketches": (CountSketch(width=5), CountSketch(width=30)),
}
Happens = Callable[[nn.Module, Optimizer, int], None]

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")


def _train(
    codecs: tuple[Codec, Codec],
    happens: Happens,
    *,
    forget: bool = False,
    make: type[Optimizer] = AdamW,
    **options: object,
) -> tuple[dict[str, Tensor], list[bool]]:
    """Parameters and states after some steps, and which of these were prepared."""
    torch.manual_seed(0)
    model = nn.ModuleList([*(nn.Embedding(20, 8) for _ in range(4)), nn.Embedding(5, 3), nn.Embedding(5, 3).bfloat16()])
    first, second = codecs
    chosen = {SGD: {"first_moment": first}, AdamW: {"first_moment": first, "second_moment": second}}
    policy = Policy([Rule(name="*", **chosen.get(make, {"second_moment": second}))])
    optimizer = compress(make(model.parameters(), lr=0.1, **options), model, policy, nonfinite="skip")
    prepared = []
    for step in range(STEPS):
        for param in model.parameters():
            param.grad = torch.randn(param.shape).to(param.dtype)
        happens(model, optimizer, step)
        if forget:
            optimizer.compression.bindings.clear()
        before = optimizer.compression.bindings.prepared
        optimizer.step()
        prepared.append(isinstance(before, Prepared) and optimizer.compression.bindings.prepared is before)
    return snapshot(model, optimizer), prepared


def _nothing(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    pass


def _other_numbers(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    group["lr"], group["eps"] = 0.1 / (step + 1), 1e-8 * (step + 1)
    group["weight_decay"], group["maximize"] = 0.1 * (step % 3), step == 4


def _no_gradient_of_one(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    if step % 3 == 1:
        model[1].weight.grad = None


def _another_count_of_one(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    if step == 4:
        optimizer.state[model[2].weight]["step"] += 3


def _another_scale_of_one(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """The same state, divided by another scale."""
    for key in [key for key in optimizer.state[model[1].weight] if key.endswith("_scale") and step == 3]:
        state = optimizer.state[model[1].weight]
        state[key] *= 0.5
        for other in [other for other in state if other != key and other.startswith(key.removesuffix("scale"))]:
            state[other].mul_(2)


def _memory_of_one_moves(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    if step > 2:
        param = model[step % 4].weight
        for tensor in (param, *optimizer.state[param].values()):
            tensor.data = tensor.data.clone()


def _rows_that_are_not_finite(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    model[step % 4].weight.grad[3, 1] = torch.nan


def _gradients_in_another_order(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    if step % 3 == 2:
        model[3].weight.grad = model[3].weight.grad.t().contiguous().t()


HAPPENINGS = [
    _nothing, _other_numbers, _no_gradient_of_one, _another_count_of_one, _another_scale_of_one, _memory_of_one_moves,
    _rows_that_are_not_finite, _gradients_in_another_order,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:NaN or inf")
@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda f: f.__name__.strip("_"))
def test_followers_train_as_each_by_itself(happens: Happens, codecs: tuple[Codec, Codec]) -> None:
    assert_same(_train(codecs, happens)[0], _train(codecs, happens, forget=True)[0])


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_every_step_but_the_first_is_prepared_while_nothing_changes(codecs: tuple[Codec, Codec]) -> None:
    for happens in (_nothing, _other_numbers):
        assert _train(codecs, happens)[1] == [False] + [True] * (STEPS - 1)
    assert _train(codecs, _another_count_of_one)[1][3:6] == [True, False, True]


@pytest.mark.parametrize("betas", [(0.01, 0.001), (0.0, 0.0)])  # by 0 a scale goes from 1 to 1
@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_scales_of_followers_are_renormalized_with_those_that_lead(
    codecs: tuple[Codec, Codec], betas: tuple[float, float]
) -> None:
    options = {"betas": betas}
    found, prepared = _train(codecs, _nothing, **options)
    assert sum(prepared) == STEPS - 1
    assert_same(found, _train(codecs, _nothing, forget=True, **options)[0])
    assert all(value > 2**-33 for key, value in found.items() if key.endswith("_scale"))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Adam, {"weight_decay": 0.1}),
        (Adagrad, {"lr_decay": 0.1}),
        (RMSprop, {"weight_decay": 0.1}),
        (SGD, {"momentum": 0.9, "nesterov": True}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_every_rule(make: type[Optimizer], options: dict[str, object]) -> None:
    codecs = (BFloat16(), RowWise())
    found, prepared = _train(codecs, _other_numbers, make=make, **options)
    assert sum(prepared) == STEPS - 1
    assert_same(found, _train(codecs, _other_numbers, forget=True, make=make, **options)[0])
