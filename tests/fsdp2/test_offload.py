"""Parameters that FSDP2 keeps on the CPU: real training on CPU ranks, and what a mesh of accelerators changes."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.optim import AdamW

from lightning_sketch import compress, decompress, restore
from lightning_sketch.sharding import is_dtensor, local
from tests.fsdp2.tools import Net, chunk, held, loss_of, make_net, net_policy, train_net
from tests.ranks import run_ranks
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed

OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}  # no memory can be pinned without an accelerator
WAYS = ("ordinary", "step in backward", "two micro-batches")


def trained(mesh: Any, rank: int, way: str, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of four steps, and what this rank holds after them."""
    model = make_net(mesh, **options)
    in_backward = way == "step in backward"
    optimizer = compress(AdamW(model.parameters(), lr=0.02), model, net_policy(), step_in_backward=in_backward)
    if way != "two micro-batches":
        return train_net(model, optimizer, rank, range(4)), held(model, optimizer)
    losses = []
    for step in range(4):
        for micro in range(2):  # both are reduced: the second is added to what is on the CPU
            loss = loss_of(model, rank, 2 * step + micro)
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, held(model, optimizer)


# What FSDP2 leaves on each rank of a machine with accelerators: local tensors on the CPU, over a mesh of "cuda". Such a
# mesh can be made without any, and whatever is moved to its device raises.


def sharded(tensor: Tensor, mesh: Any, dim: int) -> Any:
    """A DTensor whose part of this rank is on the CPU."""
    meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
    part = chunk(tensor.detach(), mesh.size(), mesh.get_local_rank(), dim)
    return DTensor(part, DTensorSpec(mesh, (Shard(dim),), tensor_meta=meta), requires_grad=False)


def build(mesh: Any) -> tuple[Net, Any]:
    """`Net` of such DTensors, and its converted optimizer."""
    model = make_net()
    for name, layer in model.named_modules():
        dim = 1 if name.startswith("by_columns.") else 0
        for key, param in list(layer.named_parameters(recurse=False)):
            setattr(layer, key, nn.Parameter(sharded(param, mesh, dim)))
    return model, compress(AdamW(model.parameters(), lr=0.02), model, net_policy())


def step(model: Net, optimizer: Any, number: int) -> None:
    """One with prescribed gradients, the same on all ranks."""
    generator = torch.Generator().manual_seed(number)
    for param in model.parameters():
        dim = param.placements[0].dim
        param.grad = sharded(torch.randn(param.shape, generator=generator), param.device_mesh, dim)
    optimizer.step()


def tensors(value: Any) -> Iterator[Tensor]:
    """All that a state dict holds, as they lie on this rank."""
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(inner)
    elif isinstance(value, Tensor):
        yield local(value)


def devices(value: Any) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors(value)})


def gathered(value: Any) -> Any:
    """A copy of a state dict with whole tensors in place of DTensors."""
    if isinstance(value, dict):
        return {key: gathered(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [gathered(inner) for inner in value]
    if isinstance(value, Tensor):
        return value.full_tensor() if is_dtensor(value) else value.clone()
    return value


def states(model: Net, optimizer: Any) -> dict[str, Any]:
    """Copies of this rank's states, by name."""
    parameters = dict(model.named_parameters())
    return {name: value for name, value in held(model, optimizer).items() if name not in parameters}


def lifetime(mesh: Any, folder: str, whole: Any = None) -> dict[str, Any]:
    """Steps, checkpoints, and back to torch's states.

    Args:
        folder: for a checkpoint.
        whole: a gathered state dict to load; ``None`` for the own one.
    """
    model, optimizer = build(mesh)
    for number in range(3):
        step(model, optimizer, number)
    saved = optimizer.state_dict()
    found = {"stepped": held(model, optimizer), "saved": devices(saved)}
    whole = gathered(saved) if whole is None else whole
    made = {name: build(mesh) for name in ("loaded", "loaded whole", "restored")}
    made["loaded"][1].load_state_dict(saved)
    made["loaded whole"][1].load_state_dict(copy.deepcopy(whole))  # which it would step
    torch.save({"optimizer": whole}, Path(folder, "whole.pt"))
    restore(made["restored"][1], Path(folder, "whole.pt"))
    found |= {name: states(*pair) for name, pair in made.items()}
    decompress(optimizer)
    found["dense"] = held(model, optimizer)
    for pair in (*made.values(), (model, optimizer)):
        step(*pair, 3)
        found["held"] = sorted({*found.get("held", ()), *devices(pair[1].state)})
    return {"found": found, "whole": whole}


def everything(rank: int, world_size: int) -> dict[str, Any]:
    here, there = (DeviceMesh(device, torch.arange(world_size)) for device in ("cpu", "cuda"))
    found: dict[str, Any] = {way: (trained(here, rank, way), trained(here, rank, way, **OFFLOAD)) for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        own = lifetime(here, folder)
        found["lifetime"] = own["found"], lifetime(there, folder, own["whole"])["found"]
    return found


@functools.cache
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("way", WAYS)
def test_training_with_offload_is_that_without_bit_for_bit(way):
    for found in ranks():
        assert_same(found[way][1], found[way][0])


def test_states_lie_where_the_parameters_lie_and_not_on_the_meshs_device():
    for found in ranks():
        for life in found["lifetime"]:
            assert life["saved"] == life["held"] == ["cpu"]


@pytest.mark.parametrize("what", ["stepped", "loaded", "loaded whole", "restored", "dense"])
def test_a_mesh_of_accelerators_changes_nothing(what):
    for found in ranks():
        here, there = found["lifetime"]
        assert_same(there[what], here[what])


@pytest.mark.parametrize("what", ["loaded", "loaded whole"])
def test_loaded_states_are_those_that_were_saved(what):
    for found in ranks():
        for life in found["lifetime"]:
            assert_same(life[what], {name: life["stepped"][name] for name in life[what]})
