"""Sketches of twice as many buckets, in the middle of training."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch import SM3, BFloat16, CountSketch, Factored, Quantized, RowWise
from lightning_sketch.codecs import StateSpec, decode, encode, widened
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.dtensor import even_shard

SHAPE = (1000, 4)
SHARDS = {
    "whole": Shard.whole(SHAPE),
    "rows": even_shard(SHAPE, 0, 3, 1, agree=True),
    "last rows": even_shard(SHAPE, 0, 3, 2, agree=True),
}
CODECS = [
    CountSketch(compression=20), CountSketch(compression=7, depth=1), CountSketch(width=13), CountSketch(20, sync=True),
    CountSketch(20, update="paper"), RowWise(compression=20), RowWise(compression=7, depth=2),
]  # fmt: skip


def spec_of(shard, *, signed=False):
    return StateSpec("state", "layer", signed, shard, 7, torch.float32, torch.float32, torch.device("cpu"))


def tables(codec, shard):
    return codec.table_shape(shard) or codec.row_table_shape(shard)


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_buckets_are_doubled_until_every_row_has_its_own(codec, shard):
    while (wider := codec.wider(shard)) is not None:
        depth, width = tables(codec, shard)
        if wider.shares_buckets(shard):
            assert tables(wider, shard) == (depth, 2 * width)
        else:
            assert 2 * width * depth >= shard.local_rows
        codec = wider
    assert not codec.shares_buckets(shard)


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_row_is_estimated_as_before(codec, signed, shard):
    if signed and codec.refuses_signed:
        codec = CountSketch(compression=3)
    spec = spec_of(shard, signed=signed)
    tensors = encode(codec, spec, torch.rand(shard.local_shape))
    before = decode(codec, spec, tensors)
    while (wider := codec.wider(shard)) is not None:
        tensors = widened(codec, wider, spec, tensors)
        torch.testing.assert_close(decode(wider, spec, tensors), before)
        codec = wider


def test_codecs_whose_rows_share_nothing_have_no_wider_one():
    shard = SHARDS["whole"]
    for codec in (BFloat16(), Quantized(), Factored(), SM3(), RowWise(), CountSketch(width=1000)):
        assert codec.wider(shard) is None
