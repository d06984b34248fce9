"""What tests of several kernels look at."""

from __future__ import annotations

import pytest
from torch import Tensor

from lightning_sketch.kernels import cpu
from lightning_sketch.kernels.schema import FusedStep


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[FusedStep]:
    """The steps that the kernels were given."""
    seen: list[FusedStep] = []
    pack = cpu._pack

    def spy(step: FusedStep, *lists: list[Tensor]) -> object:
        seen.append(step)
        return pack(step, *lists)

    monkeypatch.setattr(cpu, "_pack", spy)
    return seen
