"""FSDP2 checkpoints that move: from and to a single process, other numbers of ranks, and plain AdamW."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

from lightning_sketch import compress, decompress, decompress_state_dict, report
from tests.fsdp2.tools import RULES, chunk, held, make_net, net_policy, train_as, train_net
from tests.ranks import run_ranks
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed

STEPS = range(5)
NAMES = [name for name, _ in make_net().named_parameters()]
#: Layers whose states hold a number per element: they move bit for bit.
PER_ELEMENT = [
    f"{cut}.{number}.weight" for cut in ("by_rows", "by_columns") for number, name in enumerate(RULES)
    if name in ("exact", "bfloat16")
] + ["hidden.bias", "head.weight", "head.bias"]  # fmt: skip
#: Of these, what a plain checkpoint's states are rounded for.
ROUNDED = [f"{cut}.{list(RULES).index('bfloat16')}.weight" for cut in ("by_rows", "by_columns")]
PER_ROW = f"by_rows.{list(RULES).index('rows')}.weight"
SKETCHED_ROWS = [f"{cut}.{list(RULES).index('sketched rows')}.weight" for cut in ("by_rows", "by_columns")]
BOUNDED = [
    f"{cut}.{number}.weight" for cut in ("by_rows", "by_columns") for number, name in enumerate(RULES)
    if name in ("sketch", "sketched rows", "SM3")
]  # fmt: skip


def fresh(mesh=None, seed=0, policy_seed=0, plain=False):
    model = make_net(mesh, seed)
    optimizer = AdamW(model.parameters(), lr=0.02)
    return model, optimizer if plain else compress(optimizer, model, net_policy(policy_seed))


def decoded(model, optimizer):
    """This rank's part of every state as torch keeps it, by ``parameter.state``."""
    return held(model, decompress(optimizer))


def write(rank, world_size, folder):
    """Train on two ranks; rank 0 saves everything, gathered, of a compressed and of a plain optimizer.

    Returns what this rank's part of the compressed states decodes to.
    """
    mesh = init_device_mesh("cpu", (world_size,))
    found = {}
    for name in ("compressed", "plain"):
        model, optimizer = fresh(mesh, plain=name == "plain")
        train_net(model, optimizer, rank, STEPS)
        whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            torch.save(whole, Path(folder, f"two ranks, {name}.pt"))
        if name == "compressed":
            found = decoded(model, optimizer)
    return found


def read(rank, world_size, folder):
    """Load every file into a compressed optimizer on these ranks; the decoded states and the reported errors."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = {}
    for path in sorted(Path(folder).glob("*.pt")):
        model, optimizer = fresh(mesh, seed=1)
        _, states = torch.load(path)
        optimizer.load_state_dict(states)
        errors = {name: dict(value) for name, value in report(optimizer).conversion_errors.items()}
        losses = train_net(model, optimizer, rank, range(1))  # it goes on
        optimizer.load_state_dict(states)
        found[path.stem] = {"decoded": decoded(model, optimizer), "errors": errors, "losses": losses}
    return found | {"refused": refused(mesh, rank, folder)}


def refused(mesh, rank, folder):
    """What a wrong seed and a damaged file meet, and whether anything changed."""
    found = {}
    _, good = torch.load(Path(folder, "two ranks, compressed.pt"))
    damaged = {**good, "state": {key: dict(value) for key, value in good["state"].items()}}
    del damaged["state"]["small.weight"]["exp_avg_sq_table"]
    for name, seed, states in (("seed", 1, good), ("damaged", 0, damaged)):
        model, optimizer = fresh(mesh, policy_seed=seed)
        train_net(model, optimizer, rank, range(2))
        before, message = held(model, optimizer), ""
        try:
            optimizer.load_state_dict(states)
        except ValueError as error:
            message = str(error)
        after = held(model, optimizer)
        same = all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)
        found[name] = {"message": message, "same": same and before.keys() == after.keys()}
    return found


@functools.cache
def moved():
    """What is in every file, what the two ranks held, and what ranks made of every file, by their number."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("compressed", "plain"):
            model, optimizer = fresh(plain=name == "plain")
            train_as(2, model, optimizer, STEPS)
            torch.save((model.state_dict(), optimizer.state_dict()), Path(folder, f"one process, {name}.pt"))
        written = run_ranks(write, 2, folder)
        files = {path.stem: torch.load(path)[1] for path in Path(folder).glob("*.pt")}
        return files, written, {world_size: run_ranks(read, world_size, folder) for world_size in (2, 3)}


def dense(states):
    """The dense states in a file, by ``parameter.state``."""
    if any("compression" in group for group in states["param_groups"]):
        states = decompress_state_dict(states)
    keys = [key for group in states["param_groups"] for key in group["params"]]
    return {
        f"{name}.{state}": states["state"][key][state]
        for name, key in zip(NAMES, keys, strict=True)
        for state in ("exp_avg", "exp_avg_sq")
    }


FILES = ["one process, compressed", "one process, plain", "two ranks, compressed", "two ranks, plain"]
every_file = pytest.mark.parametrize("file", FILES)


def pairs(file, world_size, names):
    """What every rank holds of the given layers, and what it should.

    As many ranks as wrote it hold again what they held; of the largest that others know they hear in the next step.
    """
    files, written, found = moved()
    expected = dense(files[file])
    for rank, here in enumerate(found[world_size]):
        for name in names:
            for state in ("exp_avg", "exp_avg_sq"):
                whole = expected[f"{name}.{state}"]
                if (file, world_size) == ("two ranks, compressed", 2):
                    part = written[rank][f"{name}.{state}"]
                else:
                    part = chunk(whole, world_size, rank, 1 if name.startswith("by_columns") else 0)
                yield name, state, here[file]["decoded"][f"{name}.{state}"], part, here[file]["errors"]


@every_file
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_number_per_element_moves_bit_for_bit(file, world_size):
    for name, state, found, expected, errors in pairs(file, world_size, PER_ELEMENT):
        if "plain" in file and name in ROUNDED:
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert_same(found, expected, f"{name}.{state}")
            assert errors.get(name, {}).get(state, 0.0) == 0.0


@pytest.mark.parametrize("file", [name for name in FILES if "compressed" in name])
@pytest.mark.parametrize("world_size", [2, 3])
def test_row_vectors_move_up_to_rounding(file, world_size):
    for _, _, found, expected, _ in pairs(file, world_size, [PER_ROW]):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@every_file
@pytest.mark.parametrize("world_size", [2, 3])
def test_upper_bounds_stay_upper_bounds(file, world_size):
    for name, state, found, expected, _ in pairs(file, world_size, BOUNDED):
        # the row means of a plain state are no bound of its elements
        if state == "exp_avg_sq" and not ("plain" in file and name in SKETCHED_ROWS):
            assert bool((found >= expected * (1 - 1e-5)).all()), name


@every_file
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_report_says_how_much_every_state_changed(file, world_size):
    compared = 0
    for name, state, found, expected, errors in pairs(file, world_size, set(NAMES) - {"head.weight", "head.bias"}):
        if expected.numel() and state in errors.get(name, {}) and bool((expected != 0).any()):
            compared += 1
            true = float((found - expected).norm() / expected.norm())
            assert errors[name][state] == pytest.approx(true, rel=1e-2, abs=1e-5), f"{name}.{state}"
    assert compared > 0 or (file, world_size) == ("two ranks, compressed", 2)


def test_the_same_number_of_ranks_copies():
    _, written, found = moved()
    for before, here in zip(written, found[2], strict=True):
        for name in NAMES:
            for key in (f"{name}.exp_avg", f"{name}.exp_avg_sq"):
                assert_same(here["two ranks, compressed"]["decoded"][key], before[key], key)
        assert all(x == 0 for errors in here["two ranks, compressed"]["errors"].values() for x in errors.values())


@pytest.mark.parametrize("file", ["two ranks, compressed", "two ranks, plain"])
def test_a_gathered_checkpoint_loads_in_a_single_process(file):
    states = copy.deepcopy(moved()[0][file])  # torch shares kept states with the file
    model, optimizer = fresh(seed=1)
    optimizer.load_state_dict(states)
    found, expected = decoded(model, optimizer), dense(states)
    for name in PER_ELEMENT:
        if "plain" not in file or name not in ROUNDED:
            assert_same(found[f"{name}.exp_avg"], expected[f"{name}.exp_avg"], name)
    train_as(2, model, optimizer, STEPS)


def test_a_gathered_checkpoint_loads_in_plain_adamw_once_it_is_dense():
    states = copy.deepcopy(moved()[0]["two ranks, compressed"])
    model, optimizer = fresh(plain=True)
    optimizer.load_state_dict(decompress_state_dict(states))
    found, expected = held(model, optimizer), dense(states)
    for key, value in expected.items():
        assert_same(found[key], value, key)
    assert float(found["head.bias.step"]) == float(found["small.weight.step"]) == len(STEPS)
    train_as(2, model, optimizer, STEPS)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_does_not_fit_is_refused_by_every_rank_before_anything_changes(world_size):
    for here in moved()[2][world_size]:
        seed, damaged = here["refused"]["seed"], here["refused"]["damaged"]
        assert seed["same"]
        assert damaged["same"]
        assert "by_rows.0.weight: its hash seed in the checkpoint is" in seed["message"]
        assert "small.weight: " in damaged["message"]
        assert "lacks ['exp_avg_sq_table']" in damaged["message"]
