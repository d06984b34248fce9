"""bfloat16 states and stochastic rounding."""

from __future__ import annotations

import struct

import pytest
import torch

from lightning_sketch import BFloat16
from lightning_sketch.codecs import decode, encode
from lightning_sketch.codecs.bfloat16 import stochastic_round
from tests.codecs.harness import Driver, make_spec

SPECIAL = [float("inf"), -float("inf"), 0.0, 1.5, -2.0, 3.3895e38, -3.3895e38]


@pytest.mark.parametrize("value", [1.0, 1.003, -1.003, 3.14159, -1e-20, 6e-39, 1e30])
@pytest.mark.parametrize("noise", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_rounding_equals_adding_bits_in_plain_python(value, noise):
    found = stochastic_round(torch.tensor([value]), torch.tensor([noise], dtype=torch.int32))
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    cut = ((bits & 0x7FFFFFFF) + noise) & 0x7FFF0000 | bits & 0x80000000  # sign and magnitude
    assert found.float().item() == struct.unpack("<f", struct.pack("<I", cut))[0]


def test_every_rounding_is_unbiased():
    """Over all 2**16 noises, the mean is the value itself."""
    noise = torch.arange(1 << 16, dtype=torch.int32)
    for value in (1.0, 1.001, -1.007, 0.3, -123.456):
        exact = torch.tensor(value)
        found = stochastic_round(exact.expand(1 << 16), noise)
        assert found.unique().numel() <= 2  # the two neighbours
        assert found.double().mean().item() == pytest.approx(exact.item(), rel=1e-7)


def test_infinities_and_nan_survive_rounding():
    noise = torch.full((len(SPECIAL),), 0xFFFF, dtype=torch.int32)
    assert stochastic_round(torch.tensor(SPECIAL), noise)[:3].tolist() == SPECIAL[:3]
    for pattern in (0x7F800001, 0x7FFFFFFF, -1):  # NaNs whose mantissa would carry over
        nan = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        assert stochastic_round(nan, noise[:1]).isnan().all()


def test_the_noise_is_uniform_over_rows_columns_and_steps():
    driver = Driver(BFloat16(), make_spec((200, 50)))
    lower = torch.tensor(1.0)
    value = lower + 2**-7 * 0.25  # a quarter of the way to the next bfloat16
    ups = []
    for _ in range(20):
        driver.step(torch.full((200, 50), value.item()), decay=0.0)
        ups.append((driver.tensors["exp_avg_sq"] > lower).double())
    up = torch.stack(ups)  # [step, row, column]
    for dims in [(0, 1), (0, 2), (1, 2)]:
        means = up.mean(dim=dims)
        error = (0.25 * 0.75 * means.numel() / up.numel()) ** 0.5
        assert (means - 0.25).abs().max() < 5 * error
    joint = (up[1:] * up[:-1]).mean(), (up[:, 1:] * up[:, :-1]).mean(), (up[..., 1:] * up[..., :-1]).mean()
    for both in joint:  # neighbours round independently
        assert both == pytest.approx(0.25**2, abs=5 * 0.25 / up.numel() ** 0.5)


def test_the_moments_of_a_layer_round_independently():
    first, second = Driver(BFloat16(), make_spec((200, 50), signed=True)), Driver(BFloat16(), make_spec((200, 50)))
    half = torch.full((200, 50), 1 + 2**-8)
    first.step(half), second.step(half)
    same = (first.state == second.state).double().mean().item()
    assert same == pytest.approx(0.5, abs=0.03)


def test_an_ema_moves_where_its_step_is_smaller_than_an_ulp():
    """beta2 = 0.999 from 1 towards 2: rounded to nearest the state would stay at 1 for ever."""
    stochastic, nearest = (Driver(BFloat16(stochastic=s), make_spec((64, 64))) for s in (True, False))
    for driver in (stochastic, nearest):
        driver.tensors["exp_avg_sq"].fill_(1.0)
        for _ in range(300):
            driver.ema(torch.full((64, 64), 2.0), beta=0.999)
    assert bool((nearest.state == 1).all())
    assert stochastic.state.mean().item() == pytest.approx(2 - 0.999**300, rel=5e-3)


def test_other_layers_round_differently():
    half = torch.full((100, 20), 1 + 2**-8)
    states = []
    for seed in (1, 2):
        driver = Driver(BFloat16(), make_spec((100, 20), seed=seed))
        driver.step(half)
        states.append(driver.state)
    assert 0.4 < (states[0] == states[1]).double().mean() < 0.6


@pytest.mark.parametrize("codec", [BFloat16(), BFloat16(stochastic=False)], ids=repr)
def test_an_ema_in_bfloat16_stays_near_the_exact_one(codec):
    driver, exact = Driver(codec, make_spec((40, 6), signed=True)), torch.zeros(40, 6)
    for _ in range(20):
        x = torch.randn(40, 6)
        exact = 0.9 * exact + 0.1 * x
        driver.ema(x)
    assert (driver.state - exact).abs().max() < 20 * 2**-8 * 0.3


def test_rounding_to_nearest_is_torchs_own():
    spec, dense = make_spec((20, 3), signed=True), torch.randn(20, 3)
    found = decode(BFloat16(stochastic=False), spec, encode(BFloat16(stochastic=False), spec, dense))
    assert torch.equal(found, dense.to(torch.bfloat16).float())
