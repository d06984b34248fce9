"""A monitor is refused under DeepSpeed's ZeRO, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sketch import Monitor, compress
from tests import tiny
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.zero.prescribed import Cells, policy, train

STAGES = (1, 3)


def refused(rank: int, world_size: int) -> dict[int, tuple[str, bool]]:
    """By stage what it raises, and whether any state was made."""
    init_deepspeed(rank, world_size)
    said = {}
    for stage in STAGES:
        model = Cells()
        optimizer: Any = compress(tiny.ADAMW.make(model.parameters()), model, policy(), monitor=Monitor())
        made = engine(model, optimizer, stage)
        try:
            train(made, [0], rank, world_size)
        except RuntimeError as error:
            said[stage] = str(error), any(optimizer.state.values())
    return said


@pytest.mark.distributed
def test_every_stage_raises_on_every_rank() -> None:
    for found in run_ranks(refused, 2):
        assert tuple(found) == STAGES
        for message, stepped in found.values():
            assert "a monitor does not work under DeepSpeed's ZeRO" in message
            assert not stepped
