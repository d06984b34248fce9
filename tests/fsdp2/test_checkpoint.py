"""FSDP2 checkpoints: every way that torch.distributed.checkpoint has of saving and loading an optimizer."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

from lightning_sketch import compress
from tests.fsdp2.tools import held, make_net, net_policy, train_net
from tests.ranks import run_ranks
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed

BEFORE, AFTER = range(5), range(5, 8)
LR = 0.02


def fresh(mesh, seed=0, policy_seed=0):
    model = make_net(mesh, seed)
    return model, compress(AdamW(model.parameters(), lr=LR), model, net_policy(policy_seed))


# Ways to save and load. Each returns a function that loads into another model and optimizer.


def through_dcp(model, optimizer, folder, rank, options=None, asynchronous=False):
    weights, states = get_state_dict(model, optimizer, options=options)
    if asynchronous:
        dcp.async_save({"model": weights, "optimizer": states}, checkpoint_id=folder).result()
    else:
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    dist.barrier()

    def load(model, optimizer):
        weights, states = get_state_dict(model, optimizer, options=options)
        target = {"model": weights, "optimizer": states}
        dcp.load(target, checkpoint_id=folder)
        set_state_dict(
            model, optimizer, model_state_dict=target["model"], optim_state_dict=target["optimizer"], options=options
        )

    return load


def async_save(model, optimizer, folder, rank):
    return through_dcp(model, optimizer, folder, rank, asynchronous=True)


def flattened(model, optimizer, folder, rank):
    return through_dcp(model, optimizer, folder, rank, StateDictOptions(flatten_optimizer_state_dict=True))


def in_memory(model, optimizer, folder, rank):
    weights, states = get_state_dict(model, optimizer)
    weights, states = torch_copy(weights), torch_copy(states)
    return lambda model, optimizer: set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)


def optimizers_own(model, optimizer, folder, rank):
    weights, states = torch_copy(model.state_dict()), torch_copy(optimizer.state_dict())

    def load(model, optimizer):
        model.load_state_dict(weights)
        optimizer.load_state_dict(states)

    return load


def full(model, optimizer, folder, rank, *, broadcast, offload):
    whole = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    weights, states = get_state_dict(model, optimizer, options=whole)
    path = Path(folder, "full.pt" if offload or broadcast else f"full{rank}.pt")
    if rank == 0 or not (offload or broadcast):
        Path(folder).mkdir(exist_ok=True)
        torch.save((weights, states), path)
    dist.barrier()

    def load(model, optimizer):
        weights, states = {}, {}
        if rank == 0 or not broadcast:
            weights, states = torch.load(path)  # weights_only=True
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        # not set_state_dict: it takes it that a rank without weights loads none, and the others wait for it
        set_model_state_dict(model, weights, options=options)
        set_optimizer_state_dict(model, optimizer, states, options=options)

    return load


def torch_copy(states):
    if isinstance(states, dict):
        return {key: torch_copy(value) for key, value in states.items()}
    if isinstance(states, list):
        return [torch_copy(value) for value in states]
    return states.detach().clone() if isinstance(states, torch.Tensor) else states


WAYS = {
    "DCP": through_dcp,
    "DCP, asynchronous": async_save,
    "DCP, flattened": flattened,
    "in memory": in_memory,
    "the optimizer's own": optimizers_own,
    "full, from rank 0": functools.partial(full, broadcast=True, offload=True),
    "full, on all ranks": functools.partial(full, broadcast=False, offload=False),
    "full, rank 0's file on all ranks": functools.partial(full, broadcast=False, offload=True),
}


def every_way(rank, world_size, folder):
    """Save, train on; load into another model, train on. What the two hold in the end, or the error."""
    mesh = init_device_mesh("cpu", (world_size,))
    model, optimizer = fresh(mesh)
    train_net(model, optimizer, rank, BEFORE)
    loads = {name: way(model, optimizer, f"{folder}/{name}", rank) for name, way in WAYS.items()}
    found = {"undisturbed": train_net(model, optimizer, rank, AFTER), "held": held(model, optimizer), "ways": {}}
    for name, load in loads.items():
        model, optimizer = fresh(mesh, seed=1)
        load(model, optimizer)
        losses = train_net(model, optimizer, rank, AFTER)
        found["ways"][name] = {"losses": losses, "held": held(model, optimizer)}
    return found


@functools.cache
def ranks(world_size):
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(every_way, world_size, folder)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(way, world_size):
    for found in ranks(world_size):
        resumed = found["ways"][way]
        assert resumed["losses"] == found["undisturbed"]
        assert_same(resumed["held"], found["held"])
