"""Parameters and gradients of every kind: few rows, no rows, few dimensions, empty, in another order in memory, in
bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_sketch import compress, decompress
from lightning_sketch.sharding import Shard
from tests.conformance.cases import NADAM, OPTIMIZERS, PARTS, VARIANTS, Case, every, give
from tests.kernels.fused_cases import assert_near

DENSE = [case for case in OPTIMIZERS if case.density == "dense"]


@every(DENSE)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of states that lose much
@pytest.mark.parametrize("shape", [(), (5,), (0,), (1, 6), (0, 4), (4, 0), (3, 2, 2)], ids=str)
def test_a_parameter_of_any_shape(case: Case, shape: tuple[int, ...]) -> None:
    model, optimizer = case.converted(torch.ones(shape))
    plain = copy.deepcopy(model)
    stock = case.optimizer(plain.parameters())
    for step in range(3):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for each, its in ((model, optimizer), (plain, stock)):
            give(each, (values, None))
            its.step()
    variant = VARIANTS[case.variant]
    if (variant.exact and case.variant != "Drop") or (variant.exact_vectors and len(shape) < 2):
        torch.testing.assert_close(model.weight, plain.weight, rtol=1e-6, atol=5e-6)
    assert model.weight.isfinite().all()
    expected = {key: value.shape for key, value in stock.state[plain.weight].items()}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = decompress(optimizer).state[model.weight]
    assert {key: value.shape for key, value in found.items()} == expected
    compress(optimizer, model, case.policy)  # which encodes
    optimizer.step()
    assert model.weight.isfinite().all()


@every(OPTIMIZERS, lambda case: case.density == "sparse")
def test_an_empty_gradient_moves_nothing(case: Case) -> None:
    (shard,) = case.shards
    model, optimizer = case.converted(torch.ones(shard.local_shape))
    nothing = torch.zeros(0, *shard.row_shape), torch.zeros(0, dtype=torch.int64)
    for number, gradient in enumerate((nothing, *case.gradients(shard, steps=1), nothing), start=1):
        before = model.weight.detach().clone()
        give(model, gradient)
        optimizer.step()
        assert torch.equal(model.weight, before) == (gradient is nothing)
        assert optimizer.state[model.weight]["step"] == number


@every(DENSE)
def test_memory_in_another_order(case: Case) -> None:
    """A parameter and its gradient that lie column by column; and a gradient that does alone."""
    (shard,) = case.shards
    found = []
    for turned, gradient_turned in ((False, False), (True, True), (False, True)):
        weight = torch.ones(shard.local_shape)
        model, optimizer = case.converted(weight.T.contiguous().T if turned else weight)
        assert model.weight.is_contiguous() != turned
        for values, _ in case.gradients(shard):
            model.weight.grad = values.T.contiguous().T if gradient_turned else values
            optimizer.step()
        found.append({"weight": model.weight.detach()} | dict(optimizer.state[model.weight]))
    assert_near(found[1], found[0])
    assert_near(found[2], found[0])


@every(PARTS, lambda case: case.layout == "whole")
def test_a_bfloat16_parameter_loses_a_rounding_a_step(case: Case) -> None:
    (shard,) = case.shards
    half, single = case.part(shard, torch.bfloat16), case.part(shard)
    single.bound.param.copy_(half.bound.param)
    steps = list(case.gradients(shard))
    for values, rows in steps:
        half.step(values.bfloat16(), rows), single.step(values.bfloat16().float(), rows)
    assert half.bound.param.dtype == torch.bfloat16
    kept = [key for key, value in single.tensors.items() if value.shape == shard.local_shape]
    for key, value in half.tensors.items():
        assert value.dtype == torch.bfloat16 or key not in kept or value.dtype == single.tensors[key].dtype, key
    scale = float(single.bound.param.abs().max())
    atol = (len(steps) * 2.0**-8 + VARIANTS[case.variant].distance) * scale
    torch.testing.assert_close(half.bound.param.float(), single.bound.param, rtol=0, atol=atol)


@every(OPTIMIZERS, lambda case: case.family == NADAM)
def test_so_does_one_of_an_optimizer_without_a_rule(case: Case) -> None:
    shard = Shard.whole((20, 6))
    weights = []
    for dtype in (torch.bfloat16, torch.float32):
        model, optimizer = case.converted(torch.ones(shard.local_shape, dtype=dtype))
        for values, rows in case.gradients(shard):
            give(model, (values.bfloat16(), rows))
            optimizer.step()
        weights.append(model.weight.detach())
    assert weights[0].dtype == torch.bfloat16
    atol = 3 * 2.0**-7 + VARIANTS[case.variant].distance
    torch.testing.assert_close(weights[0].float(), weights[1], rtol=0, atol=atol)
