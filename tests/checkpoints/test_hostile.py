"""Damaged and hostile checkpoints: refused before anything changes, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW

from lightning_sketch import Policy, compress, restore
from tests.tiny import LOSSY, Tiny, assert_same, snapshot, train

cases = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def started(policy=LOSSY):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = compress(AdamW(model.parameters()), model, policy)
    train(model, optimizer, range(2))
    return model, optimizer


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def refuse(path, match):
    """`restore` raises ValueError and changes nothing."""
    model, optimizer = started()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=match):
        restore(optimizer, path)
    assert_same(snapshot(model, optimizer), before)
    assert not Path("exploded").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.pt"
    torch.save(started()[1].state_dict(), path)
    return path


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "dcp"
    model, optimizer = started()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
    return path


def test_the_good_ones_load(good, good_directory):
    for path in (good, good_directory):
        model, optimizer = started()
        expected = snapshot(model, optimizer)
        train(model, optimizer, [5])
        restore(optimizer, path)
        state = {key: value for key, value in snapshot(model, optimizer).items() if "exp_avg" in key}
        assert_same(state, {key: expected[key] for key in state})


@cases
@given(share=st.floats(0, 0.999))
def test_truncated_anywhere(good, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "cut.pt"
    content = good.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refuse(path, "cannot be read")


@cases
@given(data=st.data())
def test_a_bit_flipped_anywhere_in_its_contents(good, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "flip.pt"
    content = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        entry = data.draw(st.sampled_from([i for i in archive.infolist() if i.file_size]))
        start = entry.header_offset + 30 + len(entry.filename) + int.from_bytes(
            content[entry.header_offset + 28 : entry.header_offset + 30], "little"
        )  # fmt: skip
    position = start + data.draw(st.integers(0, entry.file_size - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    refuse(path, "cannot be read")


def test_a_foreign_pickle_is_not_run(tmp_path):
    torch.save({"state": {}, "param_groups": [], "bomb": Bomb()}, tmp_path / "bomb.pt")
    refuse(tmp_path / "bomb.pt", "weights_only=True")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    refuse(tmp_path / "raw.pt", "no file of torch.save")


def test_a_foreign_pickle_in_a_directory_is_not_run(tmp_path, good_directory):
    shutil.copytree(good_directory, tmp_path / "bomb")
    (tmp_path / "bomb" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    refuse(tmp_path / "bomb", "refers to posix.system")


class TorchsOwnBomb:
    """Calls a function of torch.distributed.checkpoint that unpickles a file."""

    def __reduce__(self):
        return torch_save_to_dcp, ("evil.pt", "out")


def test_a_function_of_torchs_own_is_not_run_either(tmp_path, good_directory):
    torch.save({"bomb": Bomb()}, "evil.pt")
    shutil.copytree(good_directory, tmp_path / "bomb")
    (tmp_path / "bomb" / ".metadata").write_bytes(pickle.dumps(TorchsOwnBomb()))
    refuse(tmp_path / "bomb", "refers to torch.distributed.checkpoint.format_utils.torch_save_to_dcp")


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_directory_with_damaged_metadata(tmp_path, good_directory, cut):
    shutil.copytree(good_directory, tmp_path / "cut")
    metadata = tmp_path / "cut" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:cut])
    refuse(tmp_path / "cut", "cannot be trusted")


def test_a_directory_that_lacks_a_file(tmp_path, good_directory):
    shutil.copytree(good_directory, tmp_path / "lacking")
    for file in (tmp_path / "lacking").glob("*.distcp"):
        file.unlink()
    refuse(tmp_path / "lacking", "distcp is missing")


def test_a_damaged_file_of_a_directory(tmp_path, good_directory):
    shutil.copytree(good_directory, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("*.distcp")
    content = bytearray(file.read_bytes())
    for position in range(0, len(content), 50):
        content[position] ^= 0xFF
    file.write_bytes(bytes(content))
    refuse(tmp_path / "damaged", "cannot be read")


def edited(good, change, tmp_path):
    saved = torch.load(good)
    change(saved)
    torch.save(saved, tmp_path / "edited.pt")
    return tmp_path / "edited.pt"


def rewrite(saved, old, new):
    records = saved["param_groups"][0]["compression"]
    assert old in records[0]
    records[0] = records[0].replace(old, new)


EDITS = {
    "version": (lambda s: rewrite(s, '"version": 1', '"version": 7'), "written by format version 7, this is 1"),
    "record": (lambda s: rewrite(s, "{", ""), "not a record of a compressed layer"),
    "codec": (lambda s: rewrite(s, '"CountSketch"', '"Nothing"'), "record of table.weight is damaged: unknown codec"),
    "option": (lambda s: rewrite(s, '"depth": 3', '"depth": -3'), "record of table.weight is damaged"),
    "shape": (lambda s: rewrite(s, "[30, 4]", "[31, 4]"), "30|31"),
    "name": (lambda s: rewrite(s, "table.weight", "other.weight"), "other.weight, which the optimizer's does not"),
    "no table": (lambda s: s["state"][0].pop("exp_avg_table"), "has no exp_avg_table"),
    "a smaller table": (lambda s: s["state"][0].update(exp_avg_table=torch.zeros(1, 2, 4)), "exp_avg"),
    "no group": (lambda s: s.update(param_groups=[]), "checkpoint"),
    "no state": (lambda s: s.pop("state"), "it has no 'state'"),
    "foreign key": (lambda s: s["state"].update({"0": s["state"].pop(0)}), None),
}


@pytest.mark.parametrize("edit", [name for name, (_, match) in EDITS.items() if match])
def test_edited_files_are_refused(good, tmp_path, edit):
    change, match = EDITS[edit]
    refuse(edited(good, change, tmp_path), match)


def test_another_seed_is_no_damage_but_moved_exactly_as_far_as_it_can_be(good):
    """`restore`, unlike loading, moves between policies."""
    model, optimizer = started(Policy(LOSSY.rules, seed=9))
    errors = restore(optimizer, good)
    assert errors.keys() == {"table.weight"}
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="its hash seed in the checkpoint is"):
        optimizer.load_state_dict(torch.load(good))
    assert_same(snapshot(model, optimizer), before)
