"""The linear count-sketch: what it holds exactly, what it bounds, what it estimates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sketch import CountSketch
from lightning_sketch.codecs import allocate, decode, encode, relative_error
from lightning_sketch.kernels.reference import hash_rows
from lightning_sketch.sharding import Shard
from tests.codecs.harness import Driver, make_spec, scattered, sparse_steps

cases = settings(max_examples=20, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32)


@cases
@given(rows=st.integers(1, 30), dim=st.integers(1, 5), extra=st.integers(0, 3), signed=st.booleans(), seed=SEEDS)
def test_a_table_as_wide_as_the_parameter_is_the_dense_ema(rows, dim, extra, signed, seed):
    driver, dense = (
        Driver(CountSketch(width=rows + extra), make_spec((rows, dim), signed=signed)),
        torch.zeros(rows, dim),
    )
    for ids, x in sparse_steps(rows, dim, steps=6, touched=(rows + 1) // 2, seed=seed):
        x = x if signed else x.square()
        found = driver.ema(x, ids)
        dense = 0.9 * dense + 0.1 * scattered(x, ids, rows)
        torch.testing.assert_close(found, dense[ids])
    torch.testing.assert_close(driver.state, dense)


@cases
@given(width=st.integers(1, 12), depth=st.integers(1, 4), beta=st.floats(0, 1), seed=SEEDS)
def test_count_min_never_underestimates(width, depth, beta, seed):
    driver, dense = Driver(CountSketch(width=width, depth=depth), make_spec((40, 3))), torch.zeros(40, 3)
    for ids, x in sparse_steps(40, 3, steps=8, touched=11, seed=seed):
        x = x.square()
        found = driver.ema(x, ids, beta=beta)
        dense = beta * dense + (1 - beta) * scattered(x, ids, 40)
        assert bool((found >= dense[ids] * (1 - 1e-5)).all())
    assert bool((driver.state >= dense * (1 - 1e-5)).all())


@cases
@given(width=st.integers(1, 12), depth=st.integers(1, 4), signed=st.booleans(), seed=SEEDS)
def test_the_table_is_the_sketch_of_the_dense_ema(width, depth, signed, seed):
    """Linearity over time: sketching every step equals sketching the dense state once, absent rows included."""
    codec, spec = CountSketch(width=width, depth=depth), make_spec((40, 3), signed=signed, seed=seed)
    driver, dense = Driver(codec, spec), torch.zeros(40, 3)
    for ids, x in sparse_steps(40, 3, steps=8, touched=11, seed=seed):
        driver.ema(x if signed else x.square(), ids)
        dense = 0.9 * dense + 0.1 * scattered(x if signed else x.square(), ids, 40)
    torch.testing.assert_close(_table(driver.tensors, spec), _table(encode(codec, spec, dense), spec))


@pytest.mark.parametrize("signed", [False, True])
def test_sketches_of_shards_add_up_to_the_sketch_of_the_whole(signed):
    codec, whole = CountSketch(width=10), torch.rand(40, 3)
    spec = make_spec((40, 3), signed=signed)
    total = torch.zeros_like(_table(allocate(codec, spec), spec))
    for start, stop in [(0, 13), (13, 13), (13, 39), (39, 40)]:
        # laid out for all rows, so that widths agree
        part = make_spec((40, 3), signed=signed, shard=Shard((40, 3), start, stop - start, even_rows=40))
        total += _table(encode(codec, part, whole[start:stop]), part)
    torch.testing.assert_close(total, _table(encode(codec, spec, whole), spec))


@pytest.mark.parametrize("width", [40, 1000])
@pytest.mark.parametrize(("start", "stop", "even_rows"), [(0, 13, 13), (13, 13, 13), (13, 20, 13), (39, 40, None)])
def test_a_shard_of_an_exact_table_holds_its_own_rows_only(width, start, stop, even_rows):
    codec, whole = CountSketch(width=width), torch.rand(40, 3)
    spec = make_spec((40, 3), signed=True, shard=Shard((40, 3), start, stop - start, even_rows=even_rows))
    tensors = encode(codec, spec, whole[start:stop])
    assert tensors["exp_avg_table"].shape == (1, even_rows or stop - start, 3)
    assert torch.equal(decode(codec, spec, tensors), whole[start:stop])
    rows = torch.arange(0, stop - start, 2)
    state = codec.bind(spec, tensors)
    for block in spec.shard.blocks(rows):
        assert torch.equal(state.estimate(block), whole[start:stop][rows])


@pytest.mark.parametrize(
    ("codec", "width"), [(CountSketch(compression=2), 3), (CountSketch(width=9), 5), (CountSketch(width=9, depth=1), 5)]
)
def test_a_shard_gets_its_share_of_the_width(codec, width):
    shard = Shard((30, 3), 15, 11, even_rows=15)  # the last and smaller of two
    assert codec.table_shape(shard) == (codec.depth, width)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_signed_estimate_is_unbiased_over_hash_seeds(depth):
    dense = torch.randn(60, 2)
    codec, trials = CountSketch(width=8, depth=depth), 400
    errors = []
    for seed in range(trials):
        spec = make_spec((60, 2), signed=True, seed=seed * 1000)
        errors.append(decode(codec, spec, encode(codec, spec, dense)) - dense)
    stacked = torch.stack(errors)  # [trials, 60, 2]
    standard_error = stacked.std(dim=0) / trials**0.5
    z = stacked.mean(dim=0) / standard_error
    assert z.abs().max() < 5  # 120 coordinates
    assert 0.5 < z.std() < 1.5
    assert standard_error.min() > 0.02  # there was noise to average


@pytest.mark.parametrize("signed", [False, True])
def test_the_error_falls_with_the_width(signed):
    dense = torch.rand(300, 4) if not signed else torch.randn(300, 4)
    errors = []
    for width in (10, 30, 90, 270, 300):
        runs = []
        for seed in range(5):
            spec = make_spec((300, 4), signed=signed, seed=seed * 1000)
            runs.append(
                relative_error(CountSketch(width=width), spec, encode(CountSketch(width=width), spec, dense), dense)
            )
        errors.append(sum(runs) / len(runs))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0 < errors[-2] < errors[0] / 3


def test_depth_brings_the_minimum_nearer_at_equal_width():
    dense, errors = torch.rand(300, 4).pow(8), []  # a few heavy rows
    for depth in (1, 2, 4):
        spec = make_spec((300, 4))
        codec = CountSketch(width=100, depth=depth)
        errors.append(relative_error(codec, spec, encode(codec, spec, dense), dense))
    assert errors == sorted(errors, reverse=True)


def test_renormalising_changes_nothing_over_a_thousand_steps():
    """A hashed table against float64 buckets that are never divided by a scale; beta = 0.9 renormalises 4 times."""
    codec, spec = CountSketch(width=3, depth=2), make_spec((8, 1), signed=True)
    buckets, signs = hash_rows(torch.arange(8), spec.seed, 2, 3)
    driver, plain = Driver(codec, spec), torch.zeros(2, 3, 1, dtype=torch.float64)
    for ids, x in sparse_steps(8, 1, steps=1000, touched=2):
        driver.ema(x, ids)
        plain *= 0.9
        for level in range(2):
            plain[level].index_add_(0, buckets[level, ids], 0.1 * x.double() * signs[level, ids, None])
    torch.testing.assert_close(_table(driver.tensors, spec).double(), plain, rtol=1e-4, atol=1e-6)


def test_lazy_decays_a_touched_bucket_once_and_no_other():
    codec, spec = CountSketch(width=4, depth=1, lazy=True), make_spec((40, 1))
    buckets = hash_rows(torch.arange(40), spec.seed, 1, 4)[0][0]
    rows = (buckets == 2).nonzero().flatten()[:3]  # three touched rows of one bucket
    driver = Driver(codec, spec)
    driver.tensors["exp_avg_sq_table"].fill_(8.0)
    driver.ema(torch.tensor([[1.0], [2.0], [3.0]]), rows, beta=0.5)
    assert driver.tensors["exp_avg_sq_table"].flatten().tolist() == [8, 8, 0.5 * 8 + 0.5 * 6, 8]


def test_lazy_without_collisions_is_the_lazy_ema():
    driver, lazy = Driver(CountSketch(width=20, lazy=True), make_spec((20, 2), signed=True)), torch.zeros(20, 2)
    for ids, x in sparse_steps(20, 2, steps=10, touched=5):
        lazy[ids] = 0.9 * lazy[ids] + 0.1 * x
        torch.testing.assert_close(driver.ema(x, ids), lazy[ids])
    torch.testing.assert_close(driver.state, lazy)


@pytest.mark.parametrize("update", ["linear", "paper"])
def test_cleaning_multiplies_the_table_every_interval(update):
    codec = CountSketch(width=3, depth=1, update=update, cleaning_interval=4, cleaning_factor=0.25)
    driver = Driver(codec, make_spec((9, 1)))
    driver.tensors["exp_avg_sq_table"].fill_(64.0)
    largest = []
    for _ in range(9):
        driver.step(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
        largest.append(driver.tensors["exp_avg_sq_table"].max().item())
    assert largest == [64, 64, 64, 16, 16, 16, 16, 4, 4]


def test_both_moments_of_a_layer_share_their_buckets():
    """Different collisions would give v = 0 where m is not 0, and a huge update."""
    first, second = make_spec((50, 1), signed=True), make_spec((50, 1))
    for row in range(50):
        one = scattered(torch.ones(1, 1), torch.tensor([row]), 50)
        m = _table(encode(CountSketch(width=7), first, one), first)
        v = _table(encode(CountSketch(width=7), second, one), second)
        assert torch.equal(m.abs(), v)


def test_whole_rows_are_hashed():
    spec = make_spec((30, 4, 5))
    driver = Driver(CountSketch(width=6, depth=2), spec)
    driver.step(torch.rand(1, 4, 5), torch.tensor([17]))
    assert driver.tensors["exp_avg_sq_table"].shape == (2, 6, 4, 5)
    assert ((driver.tensors["exp_avg_sq_table"] != 0).flatten(2).sum(dim=2) == 20).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("codec", "rows", "shape"),
    [
        (CountSketch(), 60_000, (3, 1000)),
        (CountSketch(), 60_001, (3, 1001)),
        (CountSketch(compression=5, depth=1), 100, (1, 20)),
        (CountSketch(compression=1, depth=3), 100, (3, 34)),
        (CountSketch(compression=1, depth=1), 100, (1, 100)),
        (CountSketch(width=64, depth=4), 100, (4, 64)),
        (CountSketch(width=100, depth=4), 100, (1, 100)),
        (CountSketch(width=5), 0, (1, 0)),
        (CountSketch(), 1, (1, 1)),
    ],
)
def test_the_size_of_the_table(codec, rows, shape):
    assert codec.table_shape(Shard.whole((rows, 3))) == shape
    assert allocate(codec, make_spec((rows, 3)))["exp_avg_sq_table"].shape == (*shape, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": 0.5}, {"compression": float("nan")}, {"depth": 0}, {"width": 0}, {"width": 2**31},
        {"update": "ema"}, {"update": "paper", "lazy": True}, {"cleaning_interval": -1}, {"cleaning_factor": 0.0},
        {"cleaning_factor": 1.5},
    ],
)  # fmt: skip
def test_options_are_validated(options):
    with pytest.raises(ValueError, match=rf"CountSketch\({next(iter(options))}="):
        CountSketch(**options)


def _table(tensors, spec):
    """The true sketch: what is stored times its scale."""
    return tensors[f"{spec.name}_table"] * tensors[f"{spec.name}_scale"]


def test_a_sketch_that_ranks_share_is_for_all_rows():
    codec, shape = CountSketch(compression=2, sync=True), (40, 3)
    for cut in ("rows", "anywhere"):
        shard = Shard(shape, 10, 20, cut=cut)
        assert codec.table_shape(shard) == codec.table_shape(Shard.whole(shape)) == (3, 7)
        assert codec.sharing(shape, cut).whole == 3 * 7 * 3
    assert codec.sharing(shape, "columns") is None, "it is one process's, cut by columns"
    assert CountSketch(width=100, sync=True).sharing(shape, "rows") is None, "it is exact"
    assert CountSketch(compression=2).sharing(shape, "rows") is None
    with pytest.raises(ValueError, match="queries before it adds, so ranks cannot add up; leave sync=False"):
        CountSketch(update="paper", sync=True)
