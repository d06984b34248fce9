"""Triton's look at gradients, before ranks agree on a step. Run with TRITON_INTERPRET=1, by test_triton.py."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.triton import observe_gradients, step
from tests.kernels import observed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_sums_are_those_of_float64(dtype: torch.dtype, leave_out: bool, sparse: bool) -> None:
    observed.check(observe_gradients, observed.steps(dtype, sparse=sparse, leave_out=leave_out))


@pytest.mark.parametrize("kind", [Kind.ROW, Kind.ROW_SKETCH, Kind.FACTORED])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_state_that_holds_the_step_already_takes_no_sums(kind: Kind, first: bool, sparse: bool) -> None:
    observed.check_held(step, *observed.held_step(kind, first=first, sparse=sparse))
