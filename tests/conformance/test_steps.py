"""Steps under every codec: torch's own where it is exact, else the reference's in float64; kernels do the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.kernels import native
from lightning_sketch.sharding import Shard
from tests.conformance.cases import NADAM, OPTIMIZERS, PARTS, VARIANTS, WITHOUT_FIRST, Case, every, give
from tests.kernels.fused_cases import assert_near, by_reference

ENGINES: tuple[Callable[[], Any], ...] = (by_reference, contextlib.nullcontext)


def is_exact(case: Case) -> bool:
    variant = VARIANTS[case.variant]
    return variant.exact in ("both", case.density) or (
        variant.exact_vectors and (case.density, case.layout) == ("dense", "vector")
    )


def trained(case: Case, shard: Shard, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], bool]:
    """Parameter and states after three steps, and whether kernels took the last."""
    part = case.part(shard, dtype)
    for values, rows in case.gradients(shard):
        assert part.step(values.to(dtype), rows) == 0
    return part.snapshot(), part.fused


def by_torch(case: Case, shard: Shard) -> Tensor:
    """The parameter by torch.optim. Rows are parameters of their own: an absent one is one without a gradient."""
    param = case.part(shard).bound.param
    units = [row.clone() for row in (param if case.density == "sparse" else param[None])]
    options = WITHOUT_FIRST[case.family] if case.variant == "Drop" else {}
    optimizer = case.optimizer([unit.requires_grad_() for unit in units], **options)
    for step, (values, rows) in enumerate(case.gradients(shard)):
        for unit in units:
            unit.grad = None
        for row, value in zip(
            range(1) if rows is None else rows.tolist(), values[None] if rows is None else values, strict=True
        ):
            units[row].grad = value.to_sparse() if case.family == "sparse_adam" else value.clone()
        for state in optimizer.state.values():
            if "step" in state:  # bias correction goes by the layer's steps
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), step)
        optimizer.step()
    return torch.stack([unit.detach() for unit in units]).view(param.shape)


@every(PARTS, is_exact)
def test_an_exact_codec_steps_as_torch(case: Case) -> None:
    for shard in case.shards:
        expected = by_torch(case, shard)
        for engine in ENGINES:
            with engine():
                found, _ = trained(case, shard)
            torch.testing.assert_close(found["param"], expected, rtol=1e-6, atol=5e-6)


@every(PARTS, lambda case: case.layout == "whole")
def test_a_step_in_float32_is_near_the_one_in_float64(case: Case) -> None:
    """How far rounding takes it does not depend on where a layer is cut."""
    (shard,) = case.shards
    with by_reference():
        (found, _), (expected, _) = trained(case, shard), trained(case, shard, torch.float64)
    assert_distance(found, expected, VARIANTS[case.variant].distance)


@every(OPTIMIZERS, lambda case: case.family == NADAM)
def test_so_is_one_of_an_optimizer_without_a_rule(case: Case) -> None:
    (shard,) = case.shards
    snapshots = []
    for dtype in (torch.float32, torch.float64):
        model, optimizer = case.converted(torch.ones(shard.local_shape, dtype=dtype))
        for gradient in case.gradients(shard):
            give(model, gradient)
            optimizer.step()
        snapshots.append({"param": model.weight.detach()} | dict(optimizer.state[model.weight]))
    assert_distance(*snapshots, VARIANTS[case.variant].distance)


def assert_distance(found: dict[str, Tensor], expected: dict[str, Tensor], distance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.dtype != torch.uint8:  # what codes mean is in what becomes of the parameter
            atol = distance * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(
                found[key].double(), value.double(), rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
            )


@every(PARTS)
def test_compiled_kernels_step_as_the_reference(case: Case) -> None:
    for shard in case.shards:
        found, fused = trained(case, shard)
        assert case.kernel in (None, fused) or native.library() is None
        with by_reference():
            expected, _ = trained(case, shard)
        assert_near(found, expected)
