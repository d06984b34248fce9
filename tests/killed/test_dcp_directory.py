"""A torch.distributed.checkpoint directory that a save overwrote in part: files of two steps side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_sketch import restore
from tests.checkpoints.engines import make
from tests.forked import finish

pytestmark = pytest.mark.distributed
WHY = "the directory was overwritten in part, by a save that ended in the middle"


def overwritten(rank: int, world_size: int, folder: Path, kind: str) -> dict[str, str]:
    """What `restore` and torch's own load say of a directory in which one rank's file is of the next step."""
    run = make(kind)
    for step in (1, 2):
        run.train(range(step, step + 1))
        run.save(folder / f"{step}")
    dist.barrier()
    restore(run.target, folder / "1")
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {1.0}
    dist.barrier()
    if rank == 0:
        shutil.copy(folder / "2" / "__1_0.distcp", folder / "1" / "__1_0.distcp")
    dist.barrier()
    found = {}
    for way, load in (("restore", restore_again), ("torch", load_by_torch)):
        try:
            load(run, folder / "1")
            found[way] = ""
        except ValueError as error:
            found[way] = str(error)
    return found


def restore_again(run, path):
    restore(run.target, path)


def load_by_torch(run, path):
    saved = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    dcp.load(saved, checkpoint_id=path)
    set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"])


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_files_of_two_saves_are_refused(kind, tmp_path):
    (tmp_path / "saved").mkdir()
    found = finish(2, tmp_path / "ranks", overwritten, tmp_path / "saved", kind)
    for rank in found:
        assert f"its shards are of steps 1, 2: {WHY}" in rank["restore"]
    assert any(f"its shards are of steps 1, 2: {WHY}" in rank["torch"] for rank in found), "by the rank that sees it"
