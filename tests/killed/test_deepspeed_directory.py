"""What a killed save of DeepSpeed may leave beside files that end in the middle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_sketch import restore
from tests.checkpoints.engines import make
from tests.deepspeed_tools import init_deepspeed
from tests.forked import finish
from tests.killed.tools import REFUSAL

pytestmark = pytest.mark.distributed


def overwritten(rank: int, world_size: int, folder: Path, stage: int) -> dict[str, str]:
    """Why directories are refused: a file was written again, the latest tag is empty, ranks had not begun to write."""
    init_deepspeed(rank, world_size)
    run = make(f"zero{stage}")
    for step in (1, 2):
        run.train(range(step, step + 1))
        run.save(folder / f"{step}")
    if rank == 0:
        shutil.copytree(folder / "1", folder / "empty")
        (folder / "empty" / "latest").write_text("")
        shutil.copytree(folder / "1", folder / "begun", ignore=shutil.ignore_patterns("zero_pp_rank*"))
        name = "step/zero_pp_rank_1_mp_rank_00_optim_states.pt"
        shutil.copy(folder / "2" / name, folder / "1" / name)
    dist.barrier()
    found = {}
    for damaged in ("1", "empty", "begun"):
        try:
            restore(run.target, folder / damaged)
            found[damaged] = ""
        except ValueError as error:
            found[damaged] = str(error)
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_killed_save_may_leave_is_refused(stage, tmp_path):
    (tmp_path / "saved").mkdir()
    for found in finish(2, tmp_path / "ranks", overwritten, tmp_path / "saved", stage):
        assert "at step 2.0, another rank's file at step 1.0: the directory was overwritten in part" in found["1"]
        assert "'latest' is empty" in found["empty"]
        assert REFUSAL.search(found["begun"]), found["begun"]
