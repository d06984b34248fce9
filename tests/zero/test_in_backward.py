"""Steps in backward are refused under DeepSpeed, before anything changes."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.zero.prescribed import refused

STAGES = (0, 1, 3)


@pytest.mark.distributed
def test_every_stage_raises_on_every_rank() -> None:
    for found in run_ranks(refused, 2, STAGES, {"step_in_backward": True}):
        assert tuple(found) == STAGES
        for message, stepped in found.values():
            assert "step_in_backward=False" in message
            assert not stepped
