"""``convert`` is killed at random moments: what it writes is whole, or not there."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW

from lightning_sketch import BFloat16, CountSketch, Policy, RowWise, Rule, compress
from lightning_sketch.checkpoints import read_checkpoint
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from lightning_sketch.layers.reshard import LazyTensor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills a forked process")

KILLS = 16
LAYERS = 12


def trained() -> tuple[nn.Module, Any]:
    model = nn.Sequential(*[nn.Linear(40, 30) for _ in range(LAYERS)])
    rules = [
        Rule(name="re:^[0-5].weight", exp_avg=BFloat16(), exp_avg_sq=RowWise()),
        Rule(name="re:^[6-9].weight", exp_avg=BFloat16(), exp_avg_sq=CountSketch(compression=4)),
    ]
    optimizer = compress(AdamW(model.parameters()), model, Policy(rules))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    return model, optimizer


def convert_for_ever(source: Path, folder: Path) -> None:
    for number in range(1_000_000):
        convert_checkpoint(source, folder / f"{number}", to="plain")


def states(path: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint."""
    saved = read_checkpoint(path, NAMES if path.is_file() else None)
    return {
        f"{fqn} {key}": value if isinstance(value, torch.Tensor) else value.read()
        for fqn, layer in saved.layers.items()
        for sources in layer.states().values()
        for source in sources
        for key, value in source.tensors.items()
        if isinstance(value, torch.Tensor | LazyTensor)
    }


NAMES = [[f"{number}.{kind}" for number in range(LAYERS) for kind in ("weight", "bias")]]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_convert_leaves_is_whole(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    source = tmp_path / "source"
    if kind == "file":
        torch.save(optimizer.state_dict(), source)
    else:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=source)
    convert_checkpoint(source, tmp_path / "expected", to="plain")
    before, expected = states(source), states(tmp_path / "expected")
    wait = random.Random(0)
    found = 0
    for number in range(KILLS):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        # Forked: everything is imported already, so that the moments fall into its work.
        process = multiprocessing.get_context("fork").Process(target=convert_for_ever, args=(source, folder))
        process.start()
        while number % 2 and not (folder / "0").exists():  # half of them after at least one is done, however slow
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(wait.uniform(0.02, 0.15))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for path in folder.iterdir():
            if path.name.endswith(".partial"):
                continue  # says what it is
            if path.is_dir() and not (path / ".metadata").exists():
                with pytest.raises(ValueError, match=r"it has no \.metadata"):
                    read_checkpoint(path)
                continue
            check(states(path), expected)
            found += 1
    assert found
    check(states(source), before)


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
