"""The compiled kernels' look at gradients, before ranks agree on a step."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch.kernels import cpu, native, observe_kernel
from lightning_sketch.kernels.fields import Kind
from tests.kernels import observed


@pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_sums_are_those_of_float64(dtype: torch.dtype, leave_out: bool, sparse: bool) -> None:
    observe = observe_kernel(torch.device("cpu"))
    assert observe is not None
    observed.check(observe, observed.steps(dtype, sparse=sparse, leave_out=leave_out))


@pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")
@pytest.mark.parametrize("kind", [Kind.ROW, Kind.ROW_SKETCH, Kind.FACTORED])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_state_that_holds_the_step_already_takes_no_sums(kind: Kind, first: bool, sparse: bool) -> None:
    observed.check_held(cpu.step, *observed.held_step(kind, first=first, sparse=sparse))
