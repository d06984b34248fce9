"""A process that is killed, and a rank that dies: the last checkpoint is whole, and the run goes on from it."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW

from lightning_sketch import SM3, BFloat16, CountSketch, Policy, RowWise, Rule, compress, restore
from tests.gloo import one_thread
from tests.portable.engines import make
from tests.tiny import Tiny, assert_same, snapshot, train

STEPS = 30
POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=CountSketch(compression=2), exp_avg_sq=CountSketch(compression=2)),
        Rule(name="kept.weight", exp_avg=BFloat16(), exp_avg_sq=RowWise()),
        Rule(name="kept.bias", exp_avg=BFloat16(), exp_avg_sq=SM3()),
    ]
)


def resumed(checkpoint: Path):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = compress(AdamW(model.parameters(), lr=0.01), model, POLICY)
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    return model, optimizer, done


def run(checkpoint: Path) -> None:
    """Train from the last checkpoint to the end, saving after every step."""
    model, optimizer, done = resumed(checkpoint)
    for step in range(done, STEPS):
        train(model, optimizer, [step])
        partial = checkpoint.with_suffix(".partial")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
        partial.replace(checkpoint)


def test_killed_at_fifty_random_moments_and_resumed(tmp_path):
    """Each child inherits this process, and is killed a random time after it has made some step, or before."""
    undisturbed = tmp_path / "undisturbed.pt"
    began = time.perf_counter()
    run(undisturbed)
    one_step = (time.perf_counter() - began) / STEPS
    moments = random.Random(0)
    checkpoint = tmp_path / "last.pt"
    steps_seen = set()
    for kill in range(50):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        child = os.fork()
        if child == 0:
            run(checkpoint)
            os._exit(0)
        status = None
        # Every other time after a step at least, however slow the machine is at the moment.
        while kill % 2 and (checkpoint.stat().st_mtime_ns if checkpoint.exists() else None) == before:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            status = None
            time.sleep(one_step / 10)
        if status is None:
            time.sleep(moments.uniform(0, 4 * one_step))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if checkpoint.exists():
            steps_seen.add(torch.load(checkpoint)["step"])  # always whole
        if os.WIFEXITED(status):  # it came to the end before the signal: the next begins anew
            assert os.WEXITSTATUS(status) == 0
            assert_same(torch.load(checkpoint), torch.load(undisturbed))
            checkpoint.unlink()
    run(checkpoint)
    assert_same(torch.load(checkpoint), torch.load(undisturbed))
    assert len(steps_seen) > 3


def test_a_step_that_raises_leaves_nothing_half_done(tmp_path):
    model, optimizer, _ = resumed(tmp_path / "none")
    train(model, optimizer, range(3))
    before = snapshot(model, optimizer)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    model.kept.bias.grad[0] = float("nan")
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def doomed(rank: int, world_size: int, folder: str) -> None:
    """One of three ranks dies in the middle of training."""
    torch.set_num_threads(1)
    one_thread()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    made = make("rows")
    for step in range(6):
        made.train(range(step, step + 1))
        if step == 3:
            dcp.save(
                {"optimizer": get_optimizer_state_dict(made.model, made.optimizer)}, checkpoint_id=f"{folder}/last"
            )
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_the_others_end_with_an_error_and_the_checkpoint_resumes_on_fewer(tmp_path):
    context = mp.get_context("spawn")
    ranks = [context.Process(target=doomed, args=(rank, 3, str(tmp_path))) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    codes = [process.exitcode for process in ranks]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)  # None: it hangs
    assert codes[2] not in (0, None)
    survivor = make("single")
    restore(survivor.optimizer, tmp_path / "last")
    assert all(int(state["step"]) == 4 for state in survivor.optimizer.state.values())
    survivor.train(range(4, 6))
