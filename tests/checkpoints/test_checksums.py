"""Checksums: every large piece of a checkpoint is verified by one rank, and what is wrong is an error on all."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW

from lightning_sketch import Policy, RowWise, Rule, compress, restore
from lightning_sketch.checkpoints import read_checkpoint
from lightning_sketch.checkpoints.formats.dcp import Directory
from lightning_sketch.checkpoints.integrity import LARGE, Piece, large, pieces_of_file, share, small, verify
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from tests.ranks import run_ranks
from tests.tiny import assert_same, snapshot

POLICY = Policy([Rule(name="bias", exp_avg_sq=RowWise())])


def started() -> tuple[nn.Module, AdamW]:
    """A layer whose states are large pieces."""
    torch.manual_seed(0)
    model = nn.Linear(64, 2 * LARGE // (64 * 4))
    optimizer = compress(AdamW(model.parameters()), model, POLICY)
    model(torch.randn(3, 64)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def write(folder: Path) -> None:
    model, optimizer = started()
    torch.save(optimizer.state_dict(), folder / "good.pt")
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "good")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def damage_file(good: Path, bad: Path) -> None:
    """A copy with one bit of its largest record flipped."""
    shutil.copy(good, bad)
    with zipfile.ZipFile(bad) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    flip(bad, largest.header_offset + 200 + largest.file_size // 2)


def damage_directory(good: Path, bad: Path) -> None:
    """A copy with one bit of a tensor flipped."""
    shutil.copytree(good, bad)
    (piece,) = Directory(bad).pieces(["optimizer.state.weight.exp_avg"])
    flip(piece.path, piece.offset + piece.length // 2)


DAMAGE = {"good.pt": damage_file, "good": damage_directory}


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", DAMAGE)
def test_a_flipped_bit_in_a_tensor_is_noticed(checkpoints, name):
    DAMAGE[name](checkpoints / name, checkpoints / "bad")
    model, optimizer = started()
    before = snapshot(model, optimizer)
    wrong = r"(bad|distcp) cannot be read: .*data/\d+ in it was altered"
    with pytest.raises(ValueError, match=wrong):
        restore(optimizer, checkpoints / "bad")
    assert_same(snapshot(model, optimizer), before)
    with pytest.raises(ValueError, match=wrong):
        read_checkpoint(checkpoints / "bad", [["weight", "bias"]])
    with pytest.raises(ValueError, match=wrong):
        convert_checkpoint(checkpoints / "bad", checkpoints / "new", to="plain")
    assert not list(checkpoints.glob("new*"))


@pytest.mark.parametrize("name", DAMAGE)
def test_torch_does_not_notice(checkpoints, name):
    """Why all this is there."""
    DAMAGE[name](checkpoints / name, checkpoints / "bad")
    if name == "good":
        model, optimizer = started()
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=checkpoints / "bad")
    else:
        torch.load(checkpoints / "bad", mmap=True)


def test_small_pieces_and_large_ones_are_all(checkpoints):
    pieces = pieces_of_file(checkpoints / "good.pt")
    assert sorted(small(pieces) + large(pieces)) == sorted(pieces)
    assert len(large(pieces)) == 2
    verify(pieces)


@given(sizes=st.lists(st.integers(0, 1000), max_size=30), parts=st.integers(1, 5))
def test_every_piece_is_verified_by_one_rank(sizes, parts):
    pieces = [Piece(Path("file"), 0, 1, str(number), size) for number, size in enumerate(sizes)]
    shares = [share(pieces, index, parts) for index in range(parts)]
    assert sorted(piece for mine in shares for piece in mine) == sorted(pieces)
    loads = [sum(piece.size for piece in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def restore_on_ranks(rank: int, world_size: int, folder: str) -> list[str | bool]:
    """The errors of restoring what is damaged, or not there for one rank; and whether anything changed."""
    path = Path(folder)
    # A file for each rank: the second rank's is damaged, and only it can know.
    shutil.copy(path / "good.pt", path / f"own-{rank}.pt")
    if rank == 1:
        damage_file(path / "good.pt", path / "own-1.pt")
    dist.barrier()
    found: list[str | bool] = []
    for mine in ("bad.pt", "bad", "good.pt" if rank else "missing.pt", f"own-{rank}.pt"):
        model, optimizer = started()
        before = snapshot(model, optimizer)
        try:
            restore(optimizer, path / mine)
            found.append("restored")
        except (ValueError, FileNotFoundError) as error:
            found.append(str(error))
        assert_same(snapshot(model, optimizer), before)
    _, optimizer = started()
    found.append(restore(optimizer, path / "good") == {})
    return found


@pytest.mark.distributed
def test_an_error_on_one_rank_is_an_error_on_all(checkpoints):
    for name, suffix in (("good.pt", ".pt"), ("good", "")):
        DAMAGE[name](checkpoints / name, checkpoints / f"bad{suffix}")
    first, second = run_ranks(restore_on_ranks, 2, str(checkpoints))
    for mine, other in ((first, second), (second, first)):
        assert "bad.pt cannot be read" in mine[0]
        assert "distcp cannot be read" in mine[1]
        # One rank read the altered piece, the other was told.
        assert ("could not read the checkpoint" in mine[0]) != ("could not read the checkpoint" in other[0])
        assert mine[4] is True
    assert "there is no checkpoint at" in first[2]
    assert "rank 0 could not read the checkpoint, so no rank restores it. FileNotFoundError" in second[2]
    assert "rank 1 could not read the checkpoint, so no rank restores it. ValueError: own-1.pt" in first[3]
    assert "own-1.pt cannot be read" in second[3]
