"""The CPU's kernels step states on which ranks have agreed as the reference does."""

from __future__ import annotations

import pytest

from lightning_sketch import Codec
from lightning_sketch.sharding import Cut
from tests.kernels.agreed_cases import CUTS, FIRST, SECOND, check


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "a row not finite"])
@pytest.mark.parametrize("first", FIRST, ids=repr)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("second", SECOND, ids=repr)
def test_agreed_states(second: Codec, cut: Cut, first: Codec, bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(second, first, cut, monkeypatch, bad=bad)
