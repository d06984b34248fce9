"""A monitor is refused under DeepSpeed's ZeRO, before anything changes."""

from __future__ import annotations

import pytest

from lightning_sketch import Monitor
from tests.ranks import run_ranks
from tests.zero.prescribed import refused

STAGES = (1, 3)


@pytest.mark.distributed
def test_every_stage_raises_on_every_rank() -> None:
    for found in run_ranks(refused, 2, STAGES, {"monitor": Monitor()}):
        assert tuple(found) == STAGES
        for message, stepped in found.values():
            assert "a monitor does not work under DeepSpeed's ZeRO" in message
            assert not stepped
