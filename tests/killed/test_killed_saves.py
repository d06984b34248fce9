"""Ranks that are killed while an engine saves: the last checkpoint is whole, and a partial one is never half loaded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tests.forked import finish
from tests.killed.lightning import Lightning, LightningFSDP2
from tests.killed.stepwise import DCP, Accelerate, AccelerateFSDP2, DeepSpeed
from tests.killed.tools import REFUSAL, Engine, Left, check, damage, kill_while_it_saves, resume

KILLS = 8
ENGINES = (DCP(), DeepSpeed(), Accelerate(), AccelerateFSDP2(), Lightning(), LightningFSDP2())
#: Seconds that are waited at most once a save has begun; some end at once.
WAITS = (0.005, 0.15)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_what_a_killed_save_leaves(engine: Engine, tmp_path: Path) -> None:
    moments = random.Random(0)
    left = []
    for number in range(KILLS):
        folder = tmp_path / f"{number}"
        kill_while_it_saves(engine, folder, WAITS[number % 2], moments)
        (_, before), (step, last) = engine.saved(folder)[-2:]
        left.append(Left(step, before, last))
    damaged = damage(left[0].before, tmp_path / "damaged")
    for found in finish(engine.world, tmp_path / "check", check, engine, left, damaged, left[0].step - 1):
        refused = [why for why in found["restore"] + found["damaged"] if why]
        assert len(refused) > 1, "a file is missing, and one is truncated"
        assert all(REFUSAL.search(why) for why in refused), refused
    if not engine.fails_together:
        for run, why in zip(left, found["restore"], strict=True):
            if why:
                with pytest.raises((ProcessRaisedException, ProcessExitedException)):
                    finish(engine.world, run.last.with_suffix(".resumed"), resume, engine, run)
