"""A process that is killed, and a rank that dies: the last checkpoint is whole, and the run goes on from it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from lightning_sketch import SM3, BFloat16, CountSketch, Policy, RowWise, Rule, compress, restore
from tests import forked
from tests.checkpoints.engines import make
from tests.deepspeed_tools import init_deepspeed
from tests.tiny import Tiny, assert_same, snapshot, train

STEPS = 30
POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=CountSketch(compression=2), exp_avg_sq=CountSketch(compression=2)),
        Rule(name="kept.weight", exp_avg=BFloat16(), exp_avg_sq=RowWise()),
        Rule(name="kept.bias", exp_avg=BFloat16(), exp_avg_sq=SM3()),
    ]
)


def resumed(checkpoint: Path, **options):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = compress(AdamW(model.parameters(), lr=0.01), model, POLICY, **options)
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
    model.kept.weight.grad = model.kept.weight.grad.to_sparse()  # the table comes before it
    with pytest.raises(TypeError, match=r"kept.weight is sparse in 2 dimensions"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_a_step_that_raises_for_a_nan_is_a_whole_one(tmp_path):
    found = []
    for nonfinite in ("raise", "skip"):
        model, optimizer, _ = resumed(tmp_path / "none", nonfinite=nonfinite)
        train(model, optimizer, range(3))
        for number, param in enumerate(model.parameters()):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
        model.table.weight.grad[0, 0] = float("nan")  # the first of three layers
        before = model.table.weight[0].tolist()
        with pytest.raises(FloatingPointError) if nonfinite == "raise" else pytest.warns(UserWarning, match="NaN"):
            optimizer.step()
        assert model.table.weight[0].tolist() == before
        found.append(snapshot(model, optimizer))
    assert_same(found[0], found[1])
    assert float(found[0]["kept.bias.step"]) == 4


def doomed(rank: int, world_size: int, kind: str, checkpoint: Path) -> None:
    """One of three ranks dies in the middle of training."""
    if kind.startswith("zero"):
        init_deepspeed(rank, world_size)
    made = make(kind)
    made.train(range(4))
    made.save(checkpoint)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    made.train(range(4, 6))


def resume(rank: int, world_size: int, kind: str, checkpoint: Path) -> list[list[int]]:
    """Step counts after restoring, and two steps later."""
    if kind.startswith("zero"):
        init_deepspeed(rank, world_size)
    made = make(kind)
    restore(made.target, checkpoint)
    found = []
    for more in (range(0), range(4, 6)):
        made.train(more)
        found.append([int(state["step"]) for state in made.optimizer.state.values()])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["rows", "ddp", "zero2"])
def test_the_others_end_with_an_error_and_the_checkpoint_resumes_on_fewer(kind, tmp_path):
    checkpoint = tmp_path / "last"
    context = forked.start(3, tmp_path / "three", doomed, kind, checkpoint)
    for process in context.processes:
        process.join(timeout=forked.HANG)
    codes = [process.exitcode for process in context.processes]
    forked.kill(context)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)  # None: it hangs
    assert codes[2] not in (0, None)
    for fewer in (2, 1):
        folder = tmp_path / f"{fewer}"
        for loaded, later in forked.finish(fewer, folder, resume, kind if fewer > 1 else "single", checkpoint):
            assert loaded
            assert set(loaded) == {4}
            assert set(later) == {6}
