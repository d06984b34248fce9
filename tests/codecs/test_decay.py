"""One scalar decays a whole state, and renormalising changes nothing."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch import SM3, CountSketch, Factored, RowWise
from lightning_sketch.codecs.decay import MIN_SCALE, decayed
from tests.codecs.harness import Driver, make_spec


def test_the_scale_alone_decays_until_it_gets_small():
    tensor = torch.ones(3)
    assert decayed(1.0, 0.5, (tensor,)) == 0.5
    assert tensor.tolist() == [1, 1, 1]
    assert decayed(MIN_SCALE, 0.5, (tensor, other := torch.full((), 4.0))) == 1.0
    assert tensor.tolist() == [MIN_SCALE / 2] * 3
    assert other.item() == 2 * MIN_SCALE


def test_no_decay_never_renormalises():
    assert decayed(1.0, 1.0, (tensor := torch.ones(2),)) == 1.0
    assert tensor.tolist() == [1, 1]


def test_a_decay_of_zero_forgets_everything():
    assert decayed(0.25, 0.0, (tensor := torch.ones(2),)) == 1.0
    assert tensor.tolist() == [0, 0]


@pytest.mark.parametrize("beta", [0.9, 0.3, 0.0])
@pytest.mark.parametrize("codec", [CountSketch(width=3), RowWise(), SM3(), Factored()], ids=repr)
def test_hundreds_of_steps_equal_an_undivided_float64_ema(codec, beta):
    """beta = 0.9 renormalises every 211 steps, 0.3 every 19, 0 always."""
    generator = torch.Generator().manual_seed(0)
    driver, true = Driver(codec, make_spec((3, 1))), torch.zeros(3, 1, dtype=torch.float64)
    for _ in range(700):
        x = torch.rand(3, 1, generator=generator)
        driver.ema(x, beta=beta)
        true = beta * true + (1 - beta) * x.double()
    torch.testing.assert_close(driver.state.double(), true, rtol=1e-5, atol=0)


def test_tiny_second_moments_keep_their_precision():
    """Gradients of 1e-15 (squares of 1e-30), beta2 = 0.999, across renormalisations."""
    driver, true = Driver(RowWise(), make_spec((2, 1))), 0.0
    for step in range(25_000 // 25):
        x = 1e-30 if step % 2 else 0.0
        driver.step(torch.full((2, 1), x), decay=0.999**25, weight=1 - 0.999**25)
        true = 0.999**25 * true + (1 - 0.999**25) * x
    torch.testing.assert_close(driver.state.double(), torch.full((2, 1), true).double(), rtol=1e-4, atol=0)
