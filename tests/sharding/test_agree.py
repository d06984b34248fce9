"""all_agree: a flag is true where it is true on all ranks of its group."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split

from lightning_sketch.sharding.agree import all_agree, shard_group
from tests.ranks import run_ranks

CPU = torch.device("cpu")
WORLD = 4


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
    return {"calls": calls, "members": members, "given": flags}


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
