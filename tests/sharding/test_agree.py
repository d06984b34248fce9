"""all_agree: a flag is true where it is true on all ranks of its group."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split

from lightning_sketch.sharding.agree import all_agree, any_of_all, shard_group, vote_device
from tests.ranks import run_ranks

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda", 3), torch.device("xpu", 1)
WORLD = 4
#: What groups are made with, and where they vote about tensors on the CPU, on CUDA and elsewhere. Gloo stands for every
#: backend: only the map from kinds of devices to backends counts, and torch takes gloo for any.
DEVICES = {
    "gloo": [CPU, CUDA, CPU],
    "cpu:gloo": [CPU, CPU, CPU],
    "cpu:gloo,cuda:gloo": [CPU, CUDA, CPU],
    "cuda:gloo,cpu:gloo": [CPU, CUDA, CPU],
    "cuda:gloo": [torch.device("cuda", 1), CUDA, torch.device("cuda", 1)],  # bound to cuda:1, as by device_id
}


def vote(rank, world_size):
    """Ranks 0 and 1 are a group, ranks 2 and 3 another; beside them the world."""
    grid = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    pair, world = grid.get_group("shard"), dist.group.WORLD
    calls = {
        "no group": all_agree([rank == 1, True], [None, None], CPU),
        "world": all_agree([rank != 2, True], [world, world], CPU),
        "pair": all_agree([rank != 2], [pair], CPU),
        "mixed": all_agree([rank != 0, rank != 3, rank != 1, True, rank == 0], [pair, world, None, pair, None], CPU),
        "nothing": all_agree([], [], CPU),
    }
    flags = [rank != 0]
    all_agree(flags, [world], CPU)
    table = torch.zeros(4, 4)
    groups = {
        "plain": shard_group(table, "w"),
        "replicated": shard_group(distribute_tensor(table, grid, [Replicate(), Replicate()]), "w"),
        "rows": shard_group(distribute_tensor(table, grid, [Replicate(), Split(0)]), "w"),
        "columns": shard_group(distribute_tensor(table, grid, [Split(1), Replicate()]), "w"),
    }
    members = {name: None if group is None else dist.get_process_group_ranks(group) for name, group in groups.items()}
    return {
        "calls": calls,
        "members": members,
        "given": flags,
        "devices": devices(),
        "answers": answers(rank),
    }


def devices():
    """Where each group votes; a vote in those that have the CPU; and what torch says of a CPU tensor in the other."""
    found = {}
    for made_with in DEVICES:
        group = dist.new_group(backend=made_with)
        if made_with == "cuda:gloo":
            group.bound_device_id = torch.device("cuda", 1)
        places = [str(vote_device(group, device)) for device in (CPU, CUDA, OTHER)]
        found[made_with] = {"places": places}
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            found[made_with]["refused"] = str(error)
        else:
            found[made_with]["vote"] = all_agree([dist.get_rank() != 1, True], [group, group], CPU)
    return found


def answers(rank):
    """What any_of_all says when one rank differs, and when one raises."""

    def asked(decide):
        try:
            return any_of_all(decide)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def unreadable():
        if rank == 2:
            raise PermissionError("rank 2 may not read it")
        return True

    return {"no": asked(lambda: False), "one": asked(lambda: rank == 3), "raised": asked(unreadable)}


@functools.cache
def ranks():
    return run_ranks(vote, WORLD)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no group", [[False, True], [True, True], [False, True], [False, True]]),
        ("world", [[False, True]] * 4),
        ("pair", [[True], [True], [False], [False]]),
        (
            "mixed",
            [
                [False, False, True, True, True],
                [False, False, False, True, False],
                [True, False, True, True, False],
                [True, False, True, True, False],
            ],
        ),
        ("nothing", [[]] * 4),
    ],
)
def test_a_flag_is_true_where_it_is_true_on_all_ranks_of_its_group(name, expected):
    assert [found["calls"][name] for found in ranks()] == expected


@pytest.mark.distributed
def test_the_flags_given_are_left_alone():
    assert [found["given"] for found in ranks()] == [[False], [True], [True], [True]]


@pytest.mark.distributed
def test_the_group_of_a_parameter_is_that_of_its_shards():
    for rank, found in enumerate(ranks()):
        pair = [0, 1] if rank < 2 else [2, 3]
        across = [0, 2] if rank % 2 == 0 else [1, 3]
        assert found["members"] == {"plain": None, "replicated": None, "rows": pair, "columns": across}


@pytest.mark.distributed
@pytest.mark.parametrize("made_with", DEVICES)
def test_a_group_votes_on_a_device_that_it_has_a_backend_for(made_with):
    for found in ranks():
        group = found["devices"][made_with]
        assert group["places"] == [str(device) for device in DEVICES[made_with]]
        if "cpu" in made_with or made_with == "gloo":
            assert group["vote"] == [False, True]
        else:
            assert "No backend type associated with device type cpu" in group["refused"], "why there is a choice"


@pytest.mark.distributed
def test_all_ranks_go_the_same_way():
    for rank, found in enumerate(ranks()):
        assert (found["answers"]["no"], found["answers"]["one"]) == (False, True)
        kind = "PermissionError" if rank == 2 else "ValueError"  # the rank that failed shows its own error
        assert found["answers"]["raised"] == f"{kind}: rank 2 may not read it"
