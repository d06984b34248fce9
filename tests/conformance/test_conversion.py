"""States are encoded in the middle of training, and decoded to what torch keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch import Drop, Keep, compress, decompress, report
from tests.conformance.cases import OPTIMIZERS, VARIANTS, Case, every, give


@every(OPTIMIZERS, lambda case: case.density == "dense" or case.family == "sparse_adam")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of states that lose much
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_recorded_and_torch_gets_its_states_back(case: Case, dtype: torch.dtype) -> None:
    (shard,) = case.shards
    model = nn.ParameterDict({"weight": nn.Parameter(torch.ones(shard.local_shape, dtype=dtype))})
    optimizer = case.optimizer(model.parameters())
    first, second, third = case.gradients(shard)
    for gradient in (first, second):
        give(model, gradient)
        optimizer.step()
    stock, before = type(optimizer), copy.deepcopy(dict(optimizer.state[model.weight]))

    compress(optimizer, model, case.policy)
    errors = report(optimizer).conversion_errors["weight"]
    decompress(optimizer)
    after = optimizer.state[model.weight]
    assert type(optimizer) is stock
    assert kinds(after) == kinds(before)
    for name, codec in case.codecs.items():
        error = (after[name] - before[name]).float().norm() / before[name].float().norm()
        rounding = 1e-3 if dtype == torch.float32 else 2.0**-7  # of what is decoded
        assert errors[name] == pytest.approx(float(error), rel=rounding, abs=rounding)
        if isinstance(codec, Drop):
            assert error == 1
        elif isinstance(codec, Keep) or VARIANTS[case.variant].exact:
            assert error < 1e-6

    compress(optimizer, model, case.policy)
    give(model, third)
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == (3 if "step" in before else 2)  # SGD counts none
    assert model.weight.isfinite().all()


def kinds(state: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes of what an optimizer keeps."""
    return {key: (x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for key, x in state.items()}
