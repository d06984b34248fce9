"""States in 8 or 4 bits: codes, blocks, rounding, and what survives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from benchmarks.launches import count_step
from lightning_sketch import Policy, Quantized, Rule, compress, plan
from lightning_sketch.codecs import codec_from, decode, encode, relative_error
from lightning_sketch.codecs.quantized import NOISE_BITS, TINY
from lightning_sketch.sharding.dtensor import even_shard
from tests.codecs.harness import Driver, make_spec
from tests.tiny import assert_same
from tests.torch_versions import fake_bytes_are_indices

CODECS = pytest.mark.parametrize("codec", [Quantized(), Quantized(bits=4)], ids=["8 bits", "4 bits"])
SIGNED = pytest.mark.parametrize("signed", [False, True], ids=["second", "first"])


def values_for(shape: tuple[int, ...], signed: bool, seed: int = 0) -> torch.Tensor:
    """Of many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return x if signed else x.square()


def levels(codec: Quantized, signed: bool) -> list[float]:
    """The magnitudes that codes mean, as parts of the block's largest, in plain Python."""
    if signed:
        largest = 2 ** (codec.bits - 1) - 1
        return [(c / largest) ** 2 for c in range(largest + 1)]
    return [((c + 1) / 2**codec.bits) ** 2 for c in range(2**codec.bits)]


@SIGNED
@CODECS
def test_a_value_goes_to_one_of_its_two_neighbours(codec, signed):
    spec, x = make_spec((40, 300), signed=signed), values_for((40, 300), signed)
    tensors = encode(codec, spec, x)
    found = decode(codec, spec, tensors).double()
    absmax = torch.stack([part.abs().amax(1) for part in x.split(128, dim=1)], dim=1)  # [40, 3]
    assert torch.equal(tensors[f"{spec.name}_absmax"], absmax)
    scale = absmax.repeat_interleave(128, dim=1)[:, :300].double()
    table = torch.tensor(levels(codec, signed), dtype=torch.float64)
    part = (x.double().abs() / scale).clamp(min=table[0])
    above = torch.searchsorted(table, part * (1 - 1e-6)).clamp(max=len(table) - 1)
    below = (torch.searchsorted(table, part * (1 + 1e-6), right=True) - 1).clamp(min=0)
    got = found.abs() / scale
    assert bool(((got >= table[below] * (1 - 1e-6)) & (got <= table[above] * (1 + 1e-6))).all())
    assert bool((found * x >= 0).all())


@SIGNED
@CODECS
def test_rounding_keeps_the_expectation(codec, signed):
    x, rows = values_for((1, 128), signed), 4000
    if not signed:
        x.clamp_(min=float(x.max()) / 4**codec.bits)  # below the smallest level there is nothing to go down to
    spec = make_spec((rows, 128), signed=signed)
    found = decode(codec, spec, encode(codec, spec, x.expand(rows, 128))).double()
    widest = torch.tensor(levels(codec, signed), dtype=torch.float64).diff().max() * x.abs().max()
    assert (found.mean(0) - x[0]).abs().max() < 5 * 0.5 * widest / rows**0.5


@pytest.mark.parametrize(
    ("bits", "signed", "most"), [(8, True, 0.02), (8, False, 0.01), (4, True, 0.3), (4, False, 0.1)]
)
def test_the_error_of_a_state(bits, signed, most):
    spec, x = make_spec((64, 512), signed=signed), values_for((64, 512), signed)
    assert 0 < relative_error(Quantized(bits), spec, encode(Quantized(bits), spec, x), x) < most


@SIGNED
@CODECS
def test_what_lies_on_codes_stays_bit_for_bit(codec, signed):
    for seed in range(2):
        spec, x = make_spec((500, 130), signed=signed, seed=seed), values_for((500, 130), signed, seed)
        tensors = encode(codec, spec, x)
        other = make_spec((500, 130), signed=signed, seed=seed + 100)
        assert_same(encode(codec, other, decode(codec, spec, tensors)), tensors)


@CODECS
def test_a_second_moment_is_zero_only_where_its_whole_block_is(codec):
    x = torch.zeros(3, 200)
    x[1, 5], x[2, 199] = 1.0, 1e-30
    spec = make_spec((3, 200))
    found = decode(codec, spec, encode(codec, spec, x))
    assert bool((found[0] == 0).all())
    assert bool((found[1, :128] > 0).all())
    assert bool((found[1, 128:] == 0).all())
    assert bool((found[2, :128] == 0).all())
    assert bool((found[2, 128:] > 0).all())
    assert found[1, 5] == 1.0
    assert found[2, 199] == x[2, 199]


@SIGNED
@CODECS
def test_blocks_of_very_small_numbers_become_zero(codec, signed):
    spec = make_spec((2, 16), signed=signed)
    x = torch.full((2, 16), TINY)
    x[1] = TINY / 2
    assert torch.equal(decode(codec, spec, encode(codec, spec, x)), torch.stack((x[0], torch.zeros(16))))


@SIGNED
@CODECS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_block_and_no_other(codec, signed, bad):
    x = torch.ones(3, 256)
    x[1, 130] = bad
    spec = make_spec((3, 256), signed=signed)
    found = decode(codec, spec, encode(codec, spec, x))
    assert bool(found[1, 128:].isnan().all())
    found[1, 128:] = 1
    assert torch.equal(found, torch.ones(3, 256))


def test_an_ema_moves_where_its_step_is_smaller_than_a_code():
    """beta2 = 0.999 from 1 towards 2: rounded to nearest the state would stay at 1 for ever."""
    for codec in (Quantized(), Quantized(bits=4)):
        driver = Driver(codec, make_spec((64, 64)))
        driver.tensors = encode(codec, driver.spec, torch.ones(64, 64))
        for _ in range(300):
            driver.ema(torch.full((64, 64), 2.0), beta=0.999)
        assert driver.state.mean().item() == pytest.approx(2 - 0.999**300, rel=2e-2)


@SIGNED
@CODECS
def test_an_ema_stays_near_the_exact_one(codec, signed):
    driver, exact = Driver(codec, make_spec((32, 256), signed=signed)), torch.zeros(32, 256)
    for step in range(40):
        x = values_for((32, 256), signed, step)
        exact = 0.9 * exact + 0.1 * x
        found = driver.ema(x)
    assert (found - exact).norm() / exact.norm() < (0.05 if codec.bits == 8 else 0.5)


def test_both_moments_and_other_layers_round_independently():
    x = torch.full((100, 128), 0.43)
    x[:, 0] = 1.0
    ups = []
    for signed, seed in ((False, 1), (True, 1), (False, 2)):
        spec = make_spec((100, 128), signed=signed, seed=seed)
        ups.append(decode(Quantized(bits=4), spec, encode(Quantized(bits=4), spec, x))[:, 1:] > 0.43)
    for a, b in ((0, 1), (0, 2)):
        both = torch.stack((ups[a].flatten(), ups[b].flatten())).double()
        assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / both.shape[1] ** 0.5


@CODECS
def test_a_vector_has_blocks_along_itself(codec):
    spec = make_spec((1000,))
    tensors = encode(codec, spec, values_for((1000,), False))
    assert tensors["exp_avg_sq_codes"].shape == (1000 * codec.bits // 8,)
    assert tensors["exp_avg_sq_absmax"].shape == (8,)


@CODECS
def test_a_sparse_step_of_a_vector_leaves_other_blocks_alone(codec):
    driver, exact = Driver(codec, make_spec((1000,), signed=True)), values_for((1000,), True)
    driver.step(exact)
    before = driver.state
    driver.ema(torch.full((2,), 0.5), torch.tensor([130, 999]), beta=0.5)
    after = driver.state
    for untouched in (slice(0, 128), slice(256, 896)):
        assert torch.equal(after[untouched], before[untouched])
    assert after[130] != before[130]


@CODECS
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(10, 37), (7, 5, 30), (300,)], ids=str)
def test_all_shards_have_tensors_of_one_shape_where_those_are_stacked(codec, dim, shape):
    if dim >= len(shape):
        return
    shards = [even_shard(shape, dim, 4, i) for i in range(4)]
    specs = [make_spec(shape, shard=shard) for shard in shards if shard.local_rows and shard.row_numel]
    for suffix, axes in codec.axes(len(shape)).items():
        found = {tuple(codec.allocate(spec)[suffix].shape) for spec in specs}
        assert len(found) == 1 or dim in axes


@CODECS
@pytest.mark.parametrize("shape", [(9, 300), (3, 130), (5, 1), (17,), (4, 2, 3)], ids=str)
def test_bytes_are_the_codes_and_a_number_for_every_block(codec, shape):
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    expected = rows * (-(-columns * codec.bits // 8) + 4 * -(-columns // 128))
    assert codec.nbytes(make_spec(shape)) == expected
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(shape))
    optimizer = AdamW(model.parameters())
    policy = Policy([Rule(name="weight", first_moment=codec, second_moment=codec)])
    planned = plan(model, optimizer, policy).bytes_after
    compress(optimizer, model, policy)
    model.weight.grad = torch.ones(shape)
    optimizer.step()
    assert planned == sum(v.nbytes for k, v in optimizer.state[model.weight].items() if k != "step")


def test_states_that_a_trainer_cast_are_put_back():
    model = nn.Linear(40, 8)
    policy = Policy([Rule(name="weight", first_moment=Quantized(), second_moment=Quantized())])
    optimizer = compress(AdamW(model.parameters()), model, policy)
    model.weight.grad = torch.randn(8, 40)
    optimizer.step()
    state = optimizer.state[model.weight]
    before = {key: value.clone() for key, value in state.items()}
    for key in ("exp_avg_codes", "exp_avg_sq_codes"):
        state[key] = state[key].to(torch.bfloat16)  # holds all integers up to 256
    model.weight.grad = torch.zeros(8, 40)
    optimizer.step()
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert (state["exp_avg_codes"] == before["exp_avg_codes"]).double().mean() > 0.9


def test_coordinates_without_gradients_do_not_blow_up():
    """A first moment that outlives a lost second one would be divided by next to nothing."""
    for codec in (Quantized(), Quantized(bits=4)):
        model = nn.Linear(128, 4, bias=False)
        optimizer = compress(
            AdamW(model.parameters(), lr=1e-2, weight_decay=0.0),
            model,
            Policy([Rule(name="*", first_moment=codec, second_moment=codec)]),
        )
        before = model.weight.detach().clone()
        for step in range(300):
            model.weight.grad = torch.randn(4, 128) * 1e-4
            model.weight.grad[:, :4] += 10.0
            if step > 20:
                model.weight.grad[:, 64:] = 0.0
            optimizer.step()
        # Adam's step is about the learning rate at most
        assert (model.weight - before).abs().max() < 300 * 1.2e-2
        assert (model.weight - before)[:, 64:].abs().max() < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 6}, r"Quantized\(bits=6\): must be 8 or 4"),
        ({"block": 100}, r"Quantized\(block=100\): must be a power of two from 16"),
        ({"block": 8}, r"Quantized\(block=8\)"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Quantized(**options)


def test_it_is_named_in_policies():
    assert codec_from({"codec": "Quantized", "bits": 4}) == Quantized(bits=4)
    policy = Policy([Rule(name="*", first_moment="Quantized", second_moment={"codec": "Quantized", "block": 64})])
    assert Policy.from_dict(policy.to_dict()) == policy


def test_noise_is_coarser_than_errors_of_arithmetic():
    """The widest step between codes, over twice the number of noises, is above the rounding error of a ratio."""
    for largest in (127, 256, 7, 16):
        gap, error = (2 * largest - 1) / 2 ** (NOISE_BITS + 1), 3 * 2**-24 * largest**2
        assert error < gap


@fake_bytes_are_indices
@CODECS
@pytest.mark.parametrize("shape", [(6_000, 1_000), (300_000, 2), (50_000,)], ids=str)
def test_a_step_on_an_accelerator_waits_for_nothing(codec, shape):
    policy = Policy([Rule(name="*", first_moment=codec, second_moment=codec)])
    counts, bound = count_step([shape], policy, nonfinite="propagate")
    assert counts.waits == 0
    assert counts.temporaries <= bound
