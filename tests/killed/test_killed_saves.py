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

KILLS = 2
ENGINES = (DCP(), DeepSpeed(), Accelerate(), AccelerateFSDP2(), Lightning(), LightningFSDP2())
#: Seconds that are waited at most once a save has begun; some end at once.
WAITS = (0.005, 0.15)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_what_a_killed_save_leaves(engine: Engine, tmp_path: Path) -> None:
    """What is left is loaded exactly, or refused by all ranks.

    Ranks are killed at random moments, so it cannot be demanded that any save is partial (Lightning's single file is
    put in place at once). The damaged copies are the certain part: `restore` refuses each that lacks a part of what it
    needs, and no other.
    """
    moments = random.Random(0)
    left = []
    for number in range(KILLS):
        folder = tmp_path / f"{number}"
        kill_while_it_saves(engine, folder, WAITS[number % 2], moments)
        (_, before), (step, last) = engine.saved(folder)[-2:]
        left.append(Left(step, before, last))
    damaged = damage(engine, left[0].before, tmp_path / "damaged")
    assert any(damaged.values())
    by_rank = finish(engine.world, tmp_path / "check", check, engine, left, list(damaged), left[0].step - 1)
    partial = [bool(why) for why in by_rank[0]["restore"]]
    for found in by_rank:
        assert [bool(why) for why in found["restore"]] == partial, "the ranks disagree"
        assert {copy: bool(why) for copy, why in zip(damaged, found["damaged"], strict=True)} == damaged
        refused = [why for why in found["restore"] + found["damaged"] if why]
        assert all(REFUSAL.search(why) for why in refused), refused
    if not engine.fails_together:
        for run, is_partial in zip(left, partial, strict=True):
            if is_partial:
                with pytest.raises((ProcessRaisedException, ProcessExitedException)):
                    finish(engine.world, run.last.with_suffix(".resumed"), resume, engine, run)
