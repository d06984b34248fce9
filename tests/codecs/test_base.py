"""What every codec promises: encode, decode, relative_error, nbytes, check, to_dict."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lightning_sketch import SM3, CountSketch, Drop, Factored, Keep, RowWise
from lightning_sketch.codecs import allocate, codec_from, decode, encode, relative_error
from lightning_sketch.codecs.state import key_of
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding import base as sharding_base
from tests.codecs.harness import STORING, Driver, make_spec, scattered, sparse_steps
from tests.tiny import assert_same

every_codec = pytest.mark.parametrize("codec", STORING, ids=repr)
SHAPES = [(), (7,), (7, 1), (7, 5), (6, 4, 3), (5, 2, 3, 2), (0,), (0, 4), (3, 0), (1, 9)]


@every_codec
def test_a_constant_state_survives_encoding_in_any_shape(codec):
    # A constant is of rank 1, its row means and maxima say all, and 3.0 is exact in bfloat16; only hashing loses it.
    for shape in SHAPES:
        spec = make_spec(shape)
        dense = torch.full(shape, 3.0)
        tensors = encode(codec, spec, dense)
        found = decode(codec, spec, tensors)
        assert found.shape == torch.Size(spec.local_shape), shape
        assert found.dtype == spec.param_dtype
        hashed = isinstance(codec, CountSketch | RowWise) and any(t.shape != shape for t in _tables(tensors))
        if not hashed:
            torch.testing.assert_close(found.view(shape), dense)
            assert relative_error(codec, spec, tensors, dense) < 1e-6, shape
        else:
            assert bool((found >= 3 - 1e-5).all()), shape


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("codec", [Keep(), CountSketch(width=1000)], ids=repr)
def test_exact_codecs_give_back_what_was_encoded(codec, signed):
    dense = torch.randn(9, 4) if signed else torch.rand(9, 4)
    spec = make_spec((9, 4), signed=signed)
    tensors = encode(codec, spec, dense)
    assert torch.equal(decode(codec, spec, tensors), dense)
    assert relative_error(codec, spec, tensors, dense) == 0.0


@pytest.mark.parametrize("codec", [c for c in STORING if getattr(c, "update", "") != "paper"], ids=repr)
def test_an_encoded_state_decays_like_one_that_grew(codec):
    spec = make_spec((6, 3))
    driver = Driver(codec, spec)
    driver.tensors = encode(codec, spec, torch.outer(torch.rand(6) + 1, torch.ones(3)))
    before = driver.state
    driver.ema(torch.zeros(6, 3), beta=0.5)
    torch.testing.assert_close(driver.state, before / 2)


@every_codec
def test_relative_error_is_the_frobenius_norm_of_the_difference(codec):
    dense = torch.rand(40, 6)
    spec = make_spec((40, 6))
    tensors = encode(codec, spec, dense)
    expected = (decode(codec, spec, tensors) - dense).norm() / dense.norm()
    assert relative_error(codec, spec, tensors, dense) == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_relative_error_of_nothing():
    spec = make_spec((4, 2))
    tensors = allocate(Keep(), spec)
    assert relative_error(Keep(), spec, tensors, torch.zeros(4, 2)) == 0.0
    assert relative_error(Keep(), spec, {"exp_avg_sq": torch.ones(4, 2)}, torch.zeros(4, 2)) == float("inf")


@every_codec
def test_nbytes_is_what_is_allocated(codec):
    for shape in SHAPES:
        spec = make_spec(shape, param_dtype=torch.bfloat16)
        assert codec.nbytes(spec) == sum(t.nbytes for t in _tables(allocate(codec, spec))), shape


def test_nbytes_allocates_nothing():
    scale = 8
    assert CountSketch(compression=20, depth=1).nbytes(make_spec((10**10, 1000))) == 10**10 * 1000 * 4 // 20 + scale


def test_a_width_that_no_hash_reaches_is_refused():
    with pytest.raises(ValueError, match=r"1000000000000 rows at compression 20 need a width below 2\*\*31"):
        CountSketch(compression=20, depth=1).nbytes(make_spec((10**12, 100)))


@every_codec
def test_the_initial_value_is_the_fill(codec):
    spec = make_spec((8, 3), fill=0.5)
    torch.testing.assert_close(Driver(codec, spec).state, torch.full((8, 3), 0.5))


# The paper's rule queries before it adds, so a block is its batch; everything else is cut freely.
@pytest.mark.parametrize("codec", [c for c in STORING if getattr(c, "update", "") != "paper"], ids=repr)
def test_nothing_depends_on_the_block_size(codec, monkeypatch):
    spec = make_spec((50, 4))
    whole = Driver(codec, spec)
    read = [whole.ema(x.square(), rows) for rows, x in sparse_steps(50, 4, steps=5, touched=20)]
    monkeypatch.setattr(sharding_base, "BLOCK_NUMEL", 12)
    cut = Driver(codec, spec)
    for (rows, x), expected in zip(sparse_steps(50, 4, steps=5, touched=20), read, strict=True):
        torch.testing.assert_close(cut.ema(x.square(), rows), expected)
    torch.testing.assert_close(cut.state, whole.state)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("codec", [c for c in STORING if c.elementwise], ids=repr)
def test_a_row_by_itself_is_stored_alike_on_every_replica_and_shard_and_left_alone_where_absent(codec, signed):
    """A codec that rounds at random goes by the row's place, and draws from no generator."""
    shape = (12, 140)
    whole, sparse = (Driver(codec, make_spec(shape, signed=signed)) for _ in range(2))
    part = Driver(codec, make_spec(shape, signed=signed, shard=Shard(shape, 8, 4)))
    for step in range(3):
        x = torch.randn(shape) if signed else torch.randn(shape).square()
        whole.ema(x), part.ema(x[8:])
        before = {key: value.clone() for key, value in sparse.tensors.items()}
        sparse.ema(x if step == 0 else x[8:], None if step == 0 else torch.arange(8, 12))
        assert_same({k: v[8:] for k, v in sparse.tensors.items()}, {k: v[8:] for k, v in whole.tensors.items()})
        assert_same({k: v[8:] for k, v in whole.tensors.items()}, part.tensors)
        assert step == 0 or all(torch.equal(v[:8], before[k][:8]) for k, v in sparse.tensors.items())


LINEAR = [c for c in STORING if isinstance(c, CountSketch | RowWise | Factored) and not c.lazy]


@pytest.mark.parametrize("codec", [c for c in LINEAR if getattr(c, "update", "") != "paper"], ids=repr)
def test_absent_rows_decay_as_under_a_dense_gradient(codec):
    sparse, dense = Driver(codec, make_spec((40, 3))), Driver(codec, make_spec((40, 3)))
    for rows, x in sparse_steps(40, 3, steps=10, touched=6):
        found = sparse.ema(x.square(), rows)
        torch.testing.assert_close(found, dense.ema(scattered(x.square(), rows, 40))[rows])
    torch.testing.assert_close(sparse.state, dense.state)


@pytest.mark.parametrize("codec", [SM3(), RowWise(), Factored()], ids=repr)
def test_a_codec_of_non_negative_states_refuses_a_first_moment(codec):
    with pytest.raises(ValueError, match=rf"{type(codec).__name__} cannot hold exp_avg of layer.weight: .*choose Drop"):
        codec.check(make_spec((4, 2), signed=True))
    codec.check(make_spec((4, 2)))


def test_a_second_moment_cannot_be_dropped():
    with pytest.raises(ValueError, match=r"Drop cannot hold exp_avg_sq of layer.weight"):
        Drop().check(make_spec((4, 2)))
    Drop().check(make_spec((4, 2), signed=True))


@pytest.mark.parametrize("codec", [*STORING, Drop(), SM3(momentum=0.9), RowWise(compression=7, depth=2)], ids=repr)
def test_a_codec_survives_its_dictionary(codec):
    written = json.loads(json.dumps(codec.to_dict()))  # primitives only
    assert codec_from(written) == codec
    assert codec_from(codec) is codec


def test_codecs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CountSketch().depth = 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Sketch", r"unknown codec 'Sketch'; known are .*CountSketch"),
        ({"compression": 3}, r"is no codec: give an object as RowWise"),
        ({"codec": "RowWise", "width": 3}, r"codec RowWise: .*width"),
        ({"codec": "SM3", "variant": "III"}, r"SM3\(variant='III'\)"),
    ],
)
def test_a_wrong_dictionary_is_an_error_that_names_it(value, message):
    with pytest.raises(ValueError, match=message):
        codec_from(value)


def test_keys_begin_with_torchs_state_name():
    assert key_of("exp_avg", "") == "exp_avg"
    assert key_of("exp_avg_sq", "table") == "exp_avg_sq_table"
    assert set(allocate(RowWise(), make_spec((4, 2)))) == {"exp_avg_sq_row", "exp_avg_sq_scale"}


def _tables(tensors):
    return [t for t in tensors.values() if isinstance(t, torch.Tensor)]


def test_rows_that_share_a_bucket_do_not_add_up_the_initial_value():
    spec = make_spec((40, 3), fill=0.5)
    dense = torch.full((40, 3), 0.5)  # nothing happened yet
    for codec in (CountSketch(compression=10), RowWise(), RowWise(compression=10), Factored(), SM3()):
        tensors = encode(codec, spec, dense)
        torch.testing.assert_close(decode(codec, spec, tensors), dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"codec": "Factored", "floor": "1e-1"},
            r"Factored\(floor='1e-1'\): must be a number \(YAML takes 1e-1 for text",
        ),
        ({"codec": "Factored", "floor": "one"}, r"Factored\(floor='one'\): must be a number"),
        ({"codec": "Factored", "floor": True}, r"Factored\(floor=True\): must be a number"),
        ({"codec": "Factored", "floor": None}, r"Factored\(floor=None\): must be a number"),
        ({"codec": "RowWise", "compression": [10]}, r"RowWise\(compression=\[10\]\): must be a number"),
        ({"codec": "CountSketch", "depth": 2.5}, r"CountSketch\(depth=2.5\): must be an integer"),
        ({"codec": "CountSketch", "width": 2.5}, r"CountSketch\(width=2.5\): must be in"),
        ({"codec": "CountSketch", "compression": float("inf")}, r"compression=inf\): must be >= 1 and finite"),
        ({"codec": "Quantized", "bits": "8"}, r"Quantized\(bits='8'\): must be an integer, not text"),
        ({"codec": "BFloat16", "stochastic": 1}, r"BFloat16\(stochastic=1\): must be True or False"),
        ({"codec": "SM3", "variant": 2}, r"SM3\(variant=2\): must be text"),
        ({"codec": "RowWise", "height": 2}, "codec RowWise: .*height"),
    ],
    ids=str,
)
def test_options_of_another_type_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        codec_from(options)
    if "height" not in options:
        name = options["codec"]
        with pytest.raises(ValueError, match=message):
            type(codec_from(name))(**{key: value for key, value in options.items() if key != "codec"})
