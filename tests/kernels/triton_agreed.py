"""The same of the Triton kernels, in Triton's interpreter; run by test_triton.py."""

from __future__ import annotations

import pytest

from lightning_sketch import BFloat16, Codec, CountSketch, Drop, kernels
from lightning_sketch.kernels.triton import launch
from lightning_sketch.sharding import Cut
from tests.kernels.agreed_cases import CUTS, SECOND, check


@pytest.mark.parametrize("first", [Drop(), BFloat16(), CountSketch(compression=3)], ids=repr)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("second", SECOND, ids=repr)
def test_agreed_states(second: Codec, cut: Cut, first: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: launch.step)
    monkeypatch.setattr(kernels, "observe_kernel", lambda device: launch.observe_gradients)
    check(second, first, cut, monkeypatch, bad=True)
