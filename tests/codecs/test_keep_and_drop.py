"""A state as torch keeps it, and no state at all."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch import Drop, Keep
from lightning_sketch.codecs import allocate
from tests.codecs.harness import Driver, make_spec


@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_is_the_dense_ema(shape, dtype):
    driver = Driver(Keep(), make_spec(shape, signed=True, dtype=dtype, param_dtype=dtype))
    dense = torch.zeros(shape or (1,), dtype=dtype)
    for _ in range(5):
        x = torch.randn(shape or (1,), dtype=dtype)
        dense = 0.9 * dense + 0.1 * x
        torch.testing.assert_close(driver.ema(x), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keep_stores_in_the_parameters_dtype(dtype):
    driver = Driver(Keep(), make_spec((4, 2), param_dtype=dtype))
    driver.step(torch.ones(4, 2))
    assert driver.tensors["exp_avg_sq"].dtype == driver.state.dtype == dtype
    assert bool((driver.state == 1).all())


def test_drop_stores_nothing():
    spec = make_spec((4, 2), signed=True)
    assert allocate(Drop(), spec) == {}
    assert Drop().nbytes(spec) == 0
