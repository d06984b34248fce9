"""Kill ranks while an engine saves, and see what can be loaded of what they leave."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_sketch import restore
from lightning_sketch.sharding import local
from tests.forked import HANG, kill, start
from tests.tiny import assert_same

#: A run stops by itself after so many saves.
MOST_SAVES = 100

#: What `restore` says of a partial checkpoint.
REFUSAL = re.compile(
    r"there is no checkpoint at |it has no \.metadata|\.metadata cannot be trusted|it is truncated"
    r"|is missing$|in zero_pp_rank files, which are missing"
    r"|the checkpoint's parts hold 0 of the \d+ elements wanted here; ranks' files are missing"
)

#: What a rank holds: copies of its parts of the parameters, and of their states.
Held = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Refused:
    """An engine did not load a checkpoint.

    Args:
        why: what it said.
        before, after: what was held then, if it can be known.
    """

    why: str
    before: Held | None = None
    after: Held | None = None


class Engine(ABC):
    """How an engine trains, saves and loads. Every method but `saved` is called on all ranks, in a fresh process."""

    world = 2
    #: Whether all ranks refuse a checkpoint that one of them cannot load, and can go on.
    fails_together = True
    #: The files of a checkpoint that `restore` needs, as patterns: those that hold the optimizer's states.
    needed: tuple[str, ...] = ("*",)

    @abstractmethod
    def run(self, folder: Path) -> None:
        """Train from the beginning, and save step n to ``folder / f"{n}"`` or the like."""

    @abstractmethod
    def undisturbed(self, steps: int) -> list[Held]:
        """What is held after 0, 1, ... `steps` steps from the beginning."""

    @abstractmethod
    def resume(self, path: Path, step: int) -> tuple[Held, Held] | Refused:
        """Load by the engine's own means what was saved at `step`: what is held then, and after one more step."""

    @abstractmethod
    def restore(self, paths: list[Path]) -> list[tuple[str, Held]]:
        """Call `restored` on each path, with states of another step in place."""

    def optimizer_in(self, path: Path) -> Path:
        """What `restore` is given of a checkpoint."""
        return path

    def saved(self, folder: Path) -> list[tuple[int, Path]]:
        """The steps of which anything was written, and where."""
        found = [(re.fullmatch(r"(?:step=)?(\d+)(?:\.ckpt)?", path.name), path) for path in folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in found if match)


def restored(target: Any, take: Callable[[], Held], path: Path) -> tuple[str, Held]:
    """Restore a checkpoint; why it was refused, or "", and what is held after."""
    before = take()
    try:
        restore(target, path)
    except (ValueError, FileNotFoundError) as error:
        assert_same(take(), before)
        return str(error), before
    return "", take()


def held(model: nn.Module, optimizer: Any) -> Held:
    """What this rank holds of a model whose parameters the optimizer has."""
    found: Held = {"parameters": {}, "states": {}}
    for name, param in model.named_parameters():
        found["parameters"][name] = local(param).detach().clone()
        if local(param).numel() == 0:
            continue  # states without rows, whose scale means nothing
        for key, value in optimizer.state.get(param, {}).items():
            found["states"][f"{name}.{key}"] = local(value).clone() if isinstance(value, Tensor) else value
    return found


def kill_while_it_saves(engine: Engine, folder: Path, wait: float, moments: random.Random) -> None:
    """Run until some saves have begun and at most `wait` seconds longer, then kill all ranks.

    Raises:
        ProcessRaisedException, ProcessExitedException: a rank raised or died by itself.
    """
    folder.mkdir()
    wanted = moments.randint(2, 4)
    context = start(engine.world, folder.with_suffix(".ranks"), _run, engine, folder)
    deadline = time.monotonic() + HANG
    all_run = True  # as of before the saves are counted: what ranks that have ended wrote is counted, too
    try:
        while (begun := len(engine.saved(folder))) < wanted:
            assert all_run, f"a rank has ended after {begun} of {wanted} saves"
            assert time.monotonic() < deadline, f"the ranks hang after {begun} of {wanted} saves"
            time.sleep(0.001)
            context.join(timeout=0)  # raises what a rank raised
            all_run = all(process.is_alive() for process in context.processes)
        time.sleep(moments.uniform(0, wait))
        context.join(timeout=0)
    finally:
        kill(context)


def _run(rank: int, world: int, engine: Engine, folder: Path) -> None:
    engine.run(folder)


def damage(engine: Engine, path: Path, folder: Path) -> dict[Path, bool]:
    """Copies of a checkpoint, of which one file each is missing, empty, or ends in the middle.

    Returns:
        whether it is a file that `restore` needs, by copy.
    """
    folder.mkdir()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    copies: dict[Path, bool] = {}
    for file in files:
        for size in (None, 0, file.stat().st_size // 2):
            copy = folder / f"{len(copies)}"
            if path.is_dir():
                shutil.copytree(path, copy)
            else:
                shutil.copy(path, copy)
            copied = copy / file.relative_to(path)
            if size is None:
                copied.unlink()
            else:
                os.truncate(copied, size)
            name = str(file.relative_to(path)) if path.is_dir() else path.name
            copies[copy] = any(fnmatch(name, pattern) for pattern in engine.needed)
    return copies


@dataclass(frozen=True)
class Left:
    """What a killed run has left.

    Args:
        step: of the last save that has begun.
        before: the save before it.
        last: the last one.
    """

    step: int
    before: Path
    last: Path


def check(rank: int, world: int, engine: Engine, left: list[Left], damaged: list[Path], step: int) -> dict[str, Any]:
    """Load what is left; it must be exact, or refused.

    Args:
        damaged: copies of a save of step `step`.

    Returns:
        why each last save and each damaged one is refused by `restore`, and by the engine; "" where it is loaded.
    """
    expected = engine.undisturbed(max(step, *(run.step for run in left)) + 1)
    found: dict[str, Any] = {"resume": [], "restore": [], "damaged": []}
    for run in left:
        assert_same(engine.resume(run.before, run.step - 1), tuple(expected[run.step - 1 : run.step + 1]))
    if engine.fails_together:
        found["resume"] = [resume(rank, world, engine, run, expected) for run in left]

    def restored_all(paths: list[Path], steps: list[int]) -> list[str]:
        verdicts = []
        for path, at, (refused, after) in zip(paths, steps, engine.restore(paths), strict=True):
            if not refused:
                assert_same(after["states"], expected[at]["states"], str(path))
            verdicts.append(refused)
        return verdicts

    assert not any(restored_all([run.before for run in left], [run.step - 1 for run in left]))
    found["restore"] = restored_all([run.last for run in left], [run.step for run in left])
    found["damaged"] = restored_all(damaged, [step] * len(damaged))
    return found


def resume(rank: int, world: int, engine: Engine, run: Left, expected: list[Held] | None = None) -> str:
    """Resume from the last save by the engine's own means: exactly, or not at all.

    Returns:
        why not. Engines load one thing after the other: all states may be in place already, but not some.

    Raises:
        RuntimeError: the engine refused on this rank; the others may be waiting for it.
    """
    expected = expected or engine.undisturbed(run.step + 1)
    found = engine.resume(run.last, run.step)
    if not isinstance(found, Refused):
        assert_same(found, tuple(expected[run.step : run.step + 2]))
        return ""
    if found.before is not None and found.after is not None:
        try:
            assert_same(found.after["states"], found.before["states"])
        except AssertionError:
            assert_same(found.after["states"], expected[run.step]["states"])
    if not engine.fails_together:
        raise RuntimeError(found.why)
    return found.why
