"""Converting torch.distributed.checkpoint directories: several optimizers, many files, everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

from lightning_sketch import compress, decompress, restore
from lightning_sketch.checkpoints.formats import dcp as portable_dcp
from lightning_sketch.cli import main
from tests.tiny import LOSSY, Tiny, assert_same, train


class Two(nn.Module):
    """Two models under one roof, as in a Lightning module with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Tiny(), Tiny()


def started() -> tuple[Two, list[Any]]:
    torch.manual_seed(0)
    model = Two()
    optimizers: list[Any] = [
        AdamW(model.first.parameters(), lr=0.1),
        SGD(model.second.parameters(), lr=0.2, momentum=0.9),
    ]
    return model, optimizers


def checkpoint_of(model: nn.Module, optimizers: list[Any]) -> dict[str, Any]:
    """The keys that Lightning writes."""
    states = {f"optimizer_{i}": get_optimizer_state_dict(model, optimizer) for i, optimizer in enumerate(optimizers)}
    return {"state_dict": dict(model.state_dict()), "epoch": torch.tensor(3), "loops": {"steps": [1, 2]}} | states


@pytest.fixture
def written(tmp_path) -> tuple[Path, Two, list[Any]]:
    model, optimizers = started()
    optimizers = [compress(optimizer, model, LOSSY) for optimizer in optimizers]
    for part, optimizer in zip((model.first, model.second), optimizers, strict=True):
        train(part, optimizer, range(2))
    dcp.save(checkpoint_of(model, optimizers), checkpoint_id=tmp_path / "old")
    return tmp_path, model, optimizers


def test_every_optimizer_of_a_directory_is_converted(written, monkeypatch, capsys):
    folder, model, optimizers = written
    monkeypatch.setattr(portable_dcp, "_FILE_BYTES", 500)  # as a large model would: many files
    assert main(["convert", str(folder / "old"), str(folder / "plain"), "--to", "plain"]) == 0
    assert "KiB" in capsys.readouterr().out
    assert len(list((folder / "plain").glob("*.distcp"))) > 3
    assert sorted(path.name for path in folder.iterdir()) == ["old", "plain"]

    fresh, plain = started()
    loaded = checkpoint_of(fresh, plain)
    dcp.load(loaded, checkpoint_id=folder / "plain")
    assert_same(loaded["state_dict"], dict(model.state_dict()))
    assert (loaded["epoch"], loaded["loops"]) == (3, {"steps": [1, 2]})
    for number, optimizer in enumerate(plain):
        set_optimizer_state_dict(fresh, optimizer, loaded[f"optimizer_{number}"])
        expected = decompress(optimizers[number]).state_dict()
        assert optimizer.param_groups[0]["lr"] == expected["param_groups"][0]["lr"]
        assert_same(optimizer.state_dict()["state"], expected["state"])


def test_there_and_back(written):
    folder, _, optimizers = written
    before = [{k: dict(v) for k, v in optimizer.state_dict()["state"].items()} for optimizer in optimizers]
    assert main(["convert", str(folder / "old"), str(folder / "same"), "--to", "compressed"]) == 0
    fresh, others = started()
    others = [compress(optimizer, fresh, LOSSY) for optimizer in others]
    for number, optimizer in enumerate(others):
        assert restore(optimizer, folder / "same", optimizer=number) == {}
        assert_same(optimizer.state_dict()["state"], before[number])


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("at", ["", "optimizer"])
def test_flattened_state_dicts_are_read_and_rewritten(tmp_path, compressed, at):
    """As torchtitan saves them, so that pipeline stages may be put together."""
    model, (optimizer, _) = started()
    model = model.first
    if compressed:
        optimizer = compress(optimizer, model, LOSSY)
    train(model, optimizer, range(2))
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    dcp.save({"state.model": torch.zeros(1)} | ({at: flat} if at else flat), checkpoint_id=tmp_path / "old")

    torch.manual_seed(0)
    fresh = Tiny()
    again = compress(AdamW(fresh.parameters(), lr=0.3), fresh, LOSSY)
    restore(again, tmp_path / "old")
    assert again.param_groups[0]["lr"] == 0.1
    expected = optimizer.state_dict()
    if not compressed:
        expected = compress(optimizer, model, LOSSY).state_dict()
    assert_same(again.state_dict()["state"], expected["state"])

    if compressed:
        assert main(["convert", str(tmp_path / "old"), str(tmp_path / "plain"), "--to", "plain"]) == 0
        plain = AdamW(fresh.parameters())
        loaded = get_optimizer_state_dict(fresh, plain, options=FLAT)
        loaded = {at: loaded} if at else loaded
        dcp.load(loaded, checkpoint_id=tmp_path / "plain")
        set_optimizer_state_dict(fresh, plain, loaded[at] if at else loaded, options=FLAT)
        assert_same(plain.state_dict()["state"], decompress(optimizer).state_dict()["state"])
        assert plain.param_groups[0]["lr"] == 0.1


def test_a_destination_without_a_folder_is_refused_at_once(written, capsys):
    folder, _, _ = written
    assert main(["convert", str(folder / "old"), str(folder / "nowhere" / "new"), "--to", "plain"]) == 1
    assert "nowhere is no folder" in capsys.readouterr().err


def test_nothing_is_left_of_a_conversion_that_fails(written, capsys):
    folder, _, _ = written
    for file in (folder / "old").glob("*.distcp"):
        content = bytearray(file.read_bytes())
        for position in range(0, len(content), 50):  # a single bit may lie where nothing does
            content[position] ^= 1
        file.write_bytes(content)
    assert main(["convert", str(folder / "old"), str(folder / "new"), "--to", "plain"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["old"]
