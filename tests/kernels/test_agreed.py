"""The CPU's kernels step states on which ranks have agreed as the reference does."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch import Codec, CountSketch
from lightning_sketch.sharding import Cut
from lightning_sketch.sharding.dtensor import even_shard
from tests.kernels.agreed_cases import CUTS, FIRST, SECOND, SHAPE, check
from tests.rules.left_out import Part, values_like


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "a row not finite"])
@pytest.mark.parametrize("first", FIRST, ids=repr)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("second", SECOND, ids=repr)
def test_agreed_states(second: Codec, cut: Cut, first: Codec, bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(second, first, cut, monkeypatch, bad=bad)


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 20, 7])], ids=["dense", "sparse"])
def test_a_synchronised_sketch_of_columns_shares_nothing_and_is_stepped_by_the_kernel(
    rows: torch.Tensor | None,
) -> None:
    shard = even_shard(SHAPE, 1, 2, 1, agree=True)
    found = []
    for sync in (True, False):
        codec = CountSketch(compression=3, sync=sync)
        part = Part.make("adamw", codec, codec, shard)
        for step in range(3):
            values = values_like(shard, step)
            part.step(values if rows is None else values[rows], rows)
            assert part.fused
        found.append(part.snapshot())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
