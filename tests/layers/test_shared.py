"""States that ranks share: stepped, they are one process's; moved, they are put together and cut out, not asked."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sketch import SM3, CountSketch, Factored, Keep, RowWise
from lightning_sketch.codecs import Codec, decode, encode
from lightning_sketch.layers.reshard import Source, dense_of, reshard
from lightning_sketch.sharding import Shard
from tests.codecs.harness import make_spec
from tests.shared_steps import Ranks, alone, part_of

CODECS: tuple[Codec, ...] = (
    RowWise(),
    RowWise(compression=3),
    Factored(),
    SM3(),
    SM3("I"),
    CountSketch(compression=2, sync=True),
)
SHAPES = ((12, 6), (10, 2, 3))
#: How ranks divide a layer: (cut, ranks, borders as shares of all elements).
LAYOUTS: dict[str, tuple[Any, int, tuple[float, ...]]] = {
    "whole": (None, 1, ()),
    "2 by rows": ("rows", 2, ()),
    "7 by rows": ("rows", 7, ()),
    "64 by rows": ("rows", 64, ()),
    "2 by columns": ("columns", 2, ()),
    "3 by columns": ("columns", 3, ()),
    "anywhere": ("anywhere", 3, (0.31, 0.72)),
    "anywhere, a row on three": ("anywhere", 4, (0.30, 0.32, 0.35)),
    "anywhere, between rows": ("anywhere", 2, (0.5,)),
}
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def trained(codec: Codec, shape: tuple[int, ...], layout: str, steps: int = 4) -> Ranks:
    """Ranks after some steps, to be changed."""
    return copy.deepcopy(_trained(codec, shape, layout, steps))


@functools.cache
def _trained(codec: Codec, shape: tuple[int, ...], layout: str, steps: int) -> Ranks:
    cut, ranks, shares = LAYOUTS[layout]
    numel = torch.Size(shape).numel()
    if cut == "columns" and shape[1] % ranks:
        ranks = shape[1]
    made = Ranks(codec, shape, cut, ranks, [int(share * numel) for share in shares])
    for step in range(steps):
        made.ema(values(shape, step))
    return made


def values(shape: tuple[int, ...], step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).square()


@every_codec
@every_shape
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_steps_together_the_state_is_one_processs(codec, shape, layout):
    whole = trained(codec, shape, "whole").decoded()[0]
    made = trained(codec, shape, layout)
    assert_whole(dense_of(make_spec(shape), made.sources()), whole)
    if not isinstance(codec, SM3):  # whose accumulators are each rank's own after a step
        for spec, found in zip(made.specs, made.decoded(), strict=True):
            assert_whole(found, part_of(whole, spec.shard))


@every_codec
@every_shape
@pytest.mark.parametrize("before", ["whole", "7 by rows", "3 by columns", "anywhere", "anywhere, a row on three"])
@pytest.mark.parametrize("after", ["whole", "2 by rows", "2 by columns", "anywhere"])
def test_it_moves_between_any_two_layouts_without_error(codec, shape, before, after):
    if isinstance(codec, CountSketch) and "columns" in (LAYOUTS[before][0], LAYOUTS[after][0]):
        return  # cut by columns nothing is shared
    whole = trained(codec, shape, "whole").decoded()[0]
    old, new = trained(codec, shape, before), trained(codec, shape, after, steps=0)
    for i, spec in enumerate(new.specs):
        new.tensors[i], error = reshard(codec, spec, old.sources())
        assert error < 1e-6
    assert_whole(dense_of(make_spec(shape), new.sources()), whole)
    for ranks in (old, new):
        ranks.ema(values(shape, 9))
    assert_whole(dense_of(make_spec(shape), new.sources()), dense_of(make_spec(shape), old.sources()))


@every_codec
def test_the_moved_tensors_are_those_that_were_saved(codec):
    shape = SHAPES[0]
    old = trained(codec, shape, "7 by rows")
    for layout in ("64 by rows", "anywhere"):
        new = trained(codec, shape, layout, steps=0)
        for spec in new.specs:
            tensors, error = reshard(codec, spec, old.sources())
            assert error == 0.0 or (codec == RowWise() and error < 1e-6)  # of whole rows nothing is shared
            if isinstance(codec, RowWise | CountSketch) and "exp_avg_sq_table" in tensors and not spec.shard.is_cut_row:
                assert torch.equal(tensors["exp_avg_sq_table"], old.tensors[0]["exp_avg_sq_table"])


@pytest.mark.parametrize("codec", [RowWise(compression=3), Factored(), RowWise()], ids=repr)
@pytest.mark.parametrize("layout", ["2 by rows", "2 by columns", "anywhere"])
def test_states_of_ranks_that_did_not_agree_are_converted_and_the_error_is_said(codec, layout):
    shape = SHAPES[0]
    new = trained(codec, shape, layout, steps=0)
    dense = values(shape, 0)
    old = []
    for shard in map(alone, (spec.shard for spec in new.specs)):
        spec = make_spec(shape, shard=shard)
        tensors = encode(codec, spec, part_of(dense, shard))
        old.append(Source(shard, tensors, codec, spec.seed, spec.signed))
    said = dense_of(make_spec(shape), old)
    expected = decode(codec, make_spec(shape), encode(codec, make_spec(shape), said))
    for i, spec in enumerate(new.specs):
        new.tensors[i], error = reshard(codec, spec, old)
        distance = float((expected - said).norm() / said.norm())
        assert error == pytest.approx(distance, rel=1e-3, abs=1e-6) or codec.sharing(shape, spec.shard.cut) is None
    assert_whole(dense_of(make_spec(shape), new.sources()), expected)


@every_codec
@pytest.mark.parametrize("layout", ["2 by rows", "anywhere"])
def test_dense_states_are_encoded_as_in_one_process(codec, layout):
    shape, dense = SHAPES[0], values(SHAPES[0], 0)
    new = trained(codec, shape, layout, steps=0)
    source = Source(Shard.whole(shape), {"exp_avg_sq": dense}, None)
    for i, spec in enumerate(new.specs):
        new.tensors[i], _ = reshard(codec, spec, [source])
    expected = decode(codec, make_spec(shape), encode(codec, make_spec(shape), dense))
    assert_whole(dense_of(make_spec(shape), new.sources()), expected)


@every_codec
def test_another_codec_is_given_what_the_whole_state_says(codec):
    shape = SHAPES[0]
    whole = trained(codec, shape, "whole").decoded()[0]
    shard = trained(Keep(), shape, "2 by rows", steps=0).specs[1].shard
    for layout in ("7 by rows", "anywhere"):
        tensors, error = reshard(Keep(), make_spec(shape, shard=shard), trained(codec, shape, layout).sources())
        assert error == 0.0
        assert_whole(tensors["exp_avg_sq"], part_of(whole, shard))


@every_codec
def test_a_missing_rank_is_an_error(codec):
    old = trained(codec, SHAPES[0], "anywhere")
    with pytest.raises(ValueError, match=r"of the 72 elements wanted here; ranks' files are missing"):
        reshard(codec, make_spec(SHAPES[0]), old.sources()[:-1])


def assert_whole(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
