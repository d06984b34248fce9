"""LayerRecord: the decision about one parameter, as an object and as primitives in a checkpoint."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Keep, RowWise
from lightning_sketch.layers.record import FORMAT_VERSION, LayerPart, LayerRecord, compute_dtype
from lightning_sketch.layers.transcode import fresh_state
from lightning_sketch.rules import StateDef
from lightning_sketch.sharding import Shard
from tests.tiny import CODECS

STATES = (StateDef("exp_avg", signed=True), StateDef("exp_avg_sq", signed=False))


def allocate(layer, param, group=None):
    return LayerPart(layer, Shard.whole((30, 4))).allocate(param, group or {})


def make(first, second, shape=(30, 4)):
    return LayerRecord.make("table.weight", 7, torch.empty(shape), STATES, {"exp_avg": first, "exp_avg_sq": second})


@pytest.mark.parametrize("name", CODECS)
def test_a_record_is_plain_data_and_gives_the_layer_back(name):
    layer = make(CODECS[name]["first_moment"], CODECS[name]["second_moment"])
    record = layer.to_record()
    assert LayerRecord.from_record(record) == layer
    assert json.loads(record)["version"] == FORMAT_VERSION


def test_a_layer_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(Keep(), SM3()).seed = 1


@pytest.mark.parametrize(
    ("first", "second", "compressed", "lazy"),
    [
        (Keep(), Keep(), False, False),
        (Keep(), RowWise(), True, False),
        (Drop(), Keep(), True, False),
        (BFloat16(), RowWise(lazy=True), True, True),
        (CountSketch(lazy=True), SM3(), True, True),
    ],
)
def test_what_it_is_follows_from_its_codecs(first, second, compressed, lazy):
    layer = make(first, second)
    assert (layer.compressed, layer.lazy) == (compressed, lazy)


def test_a_dropped_state_stores_nothing():
    layer = make(Drop(), RowWise())
    assert layer.persistent_codecs().keys() == {"exp_avg_sq"}
    assert set(allocate(layer, torch.empty(30, 4))) == {"exp_avg_sq_row", "exp_avg_sq_scale"}


def test_both_moments_of_a_layer_share_their_hash():
    part = LayerPart(make(CountSketch(), CountSketch()), Shard.whole((30, 4)))
    param = torch.empty(30, 4)
    assert part.spec("exp_avg", param, {}).seed == part.spec("exp_avg_sq", param, {}).seed == 7


def test_the_initial_value_is_that_of_the_second_moment():
    tensors = allocate(make(BFloat16(), RowWise()), torch.empty(30, 4), {"initial_accumulator_value": 0.5})
    assert (tensors["exp_avg_sq_row"] == 0.5).all()
    assert not tensors["exp_avg"].any()


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float64, torch.float64), *((d, torch.float32) for d in (torch.float32, torch.bfloat16, torch.float16))],
)
def test_arithmetic_is_at_least_float32(dtype, computed):
    param = torch.empty(30, 4, dtype=dtype)
    assert compute_dtype(param) == computed
    tensors = allocate(make(Keep(), RowWise()), param)
    assert tensors["exp_avg"].dtype == dtype  # as torch keeps it
    assert tensors["exp_avg_sq_row"].dtype == computed


def test_the_step_counter_lives_on_the_cpu():
    tensors = fresh_state(make(Keep(), RowWise()), torch.empty(30, 4, device="meta"), {})
    assert tensors["step"].device.type == "cpu"  # where reading it costs no synchronisation
    assert tensors["exp_avg_sq_row"].device.type == "meta"
