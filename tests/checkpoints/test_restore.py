"""Checkpoints move: every engine and world size into every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sketch.checkpoints import read_checkpoint, restore
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.reshard import dense_of
from lightning_sketch.sharding import Shard
from tests.checkpoints.engines import STEPS, TABLES, make
from tests.deepspeed_tools import init_deepspeed
from tests.ranks import run_ranks

#: What is written and restored on that many ranks. Two show that ZeRO-1 and -2 lay out alike, three that their number
#: need not be even, and four that it may be halved and that tensor
#: parallelism and FSDP2 may cut columns together.
KINDS = {
    1: ("single",),
    2: ("rows", "columns", "zero1", "zero2", "zero3"),
    3: ("rows", "columns", "zero3"),
    4: ("columns", "grid", "zero3"),
}


def write(rank: int, world_size: int, folder: str) -> None:
    """A checkpoint of every kind."""
    init_deepspeed(rank, world_size)
    for kind in KINDS[world_size]:
        run = make(kind)
        run.train(range(STEPS))
        run.save(Path(folder, f"{kind}-{world_size}"))


def move(rank: int, world_size: int, folder: str, sources: list[str]) -> dict[str, Any]:
    """Restore every checkpoint into every kind, save there, and train on: the next one replaces what that leaves."""
    init_deepspeed(rank, world_size)
    found: dict[str, Any] = {}
    for kind in KINDS[world_size]:
        run = make(kind)
        run.train(range(1))
        for source in sources:
            if world_size == 4 and source.endswith("-4") and source != f"{kind}-4":
                continue  # engines on as many ranks: 2 and 3 show it
            errors = restore(run.target, Path(folder, source))
            run.save(Path(folder, "moved", f"{source}-to-{kind}-{world_size}"))
            run.train(range(STEPS, STEPS + 1))
            found[f"{source}-to-{kind}-{world_size}"] = {fqn: dict(e) for fqn, e in errors.items()}
    return found


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("portable")
    (folder / "moved").mkdir()
    for world_size in KINDS:
        run_ranks(write, world_size, str(folder))
    sources = sorted(path.name for path in folder.iterdir() if path.name != "moved")
    errors: dict[str, Any] = {}
    for world_size in KINDS:
        errors |= run_ranks(move, world_size, str(folder), sources)[0]
    return folder, errors


def states_of(path: Path) -> dict[str, Tensor]:
    """All states of a checkpoint, dense."""
    names = [[f"{name}.weight" for name in TABLES] + ["head.weight", "head.bias"]]
    found = {}
    for fqn, layer in read_checkpoint(path, names).layers.items():
        decided = layer.layer or LayerRecord(fqn, 0, layer.shape, {"exp_avg": True, "exp_avg_sq": False}, {})
        part = LayerPart(decided, Shard.whole(layer.shape))
        for state, sources in layer.states().items():
            found[f"{fqn}.{state}"] = dense_of(part.spec(state, torch.empty(0), {}), sources)
        found[f"{fqn}.step"] = torch.tensor(layer.step)
    return found


def check_moved(name: str, key: str, before: Tensor, after: Tensor) -> None:
    """What a move must conserve, by codec."""
    layer, state = key.split(".")[0], key.rpartition(".")[2]
    source, target = name.split("-to-")
    if source == target or layer in ("exact", "rounded", "head") or state == "step":
        assert torch.equal(after, before), (name, key)
    elif layer == "quantized":  # rows in order; where blocks are cut otherwise, rounded once more
        limit = 0.5 if state == "exp_avg" else 0.05  # 4 bits and 8
        assert (after - before).norm() <= limit * before.norm(), (name, key)
    elif layer == "not_ours":  # float16, of other divisors where a row is cut otherwise
        assert (after - before).abs().max() <= 1e-3 * before.abs().max(), (name, key)
    elif state == "exp_avg_sq":
        if layer in ("default", "rows", "factored"):  # a row's mean, whatever pieces it is kept in
            torch.testing.assert_close(after.mean(1), before.mean(1), rtol=1e-4, atol=0, msg=f"{name} {key}")
        elif layer == "sketched_rows":  # count-min: never less than the truth
            assert (after.mean(1) >= before.mean(1) * (1 - 1e-4)).all(), (name, key)
        else:
            assert layer in ("sketch", "sm3")
            assert (after >= before * (1 - 1e-4)).all(), (name, key)


@pytest.mark.distributed
def test_every_checkpoint_moves_everywhere(moved):
    folder, errors = moved
    assert len(errors) == 9 * 12 + 3 * 10
    written = {path.name: states_of(path) for path in folder.iterdir() if path.name != "moved"}
    assert len(written) == 12
    for name in errors:
        before, after = written[name.split("-to-")[0]], states_of(folder / "moved" / name)
        assert before.keys() == after.keys(), name
        for key in before:
            check_moved(name, key, before[key], after[key])


@pytest.mark.distributed
def test_the_error_of_what_was_encoded_anew_is_reported(moved):
    _, errors = moved
    for name, found in errors.items():
        source, target = name.split("-to-")
        assert not set(found) & {"exact.weight", "rounded.weight", "head.weight", "head.bias"}, name
        assert (source == target) <= (not found), name
    # Two ranks' tables of half the width become one of the whole.
    assert errors["rows-2-to-single-1"]["sketch.weight"].keys() == {"exp_avg", "exp_avg_sq"}
    # Columns of one table: cut and joined as they are.
    for name in (
        "columns-2-to-single-1", "single-1-to-columns-3", "columns-3-to-columns-2", "columns-4-to-columns-3",
        "columns-2-to-columns-4", "columns-3-to-grid-4", "grid-4-to-columns-2",
    ):  # fmt: skip
        assert "sketch.weight" not in errors[name], name
