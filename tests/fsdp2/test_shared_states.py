"""States that ranks share are those of one process, under every cut of DTensors: so are the parameters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Adagrad, Adam, AdamW, RMSprop

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Keep, Policy, RowWise, Rule, compress
from tests.fsdp2.tools import as_dtensor, chunk
from tests.ranks import run_ranks
from tests.tiny import Case

pytestmark = pytest.mark.distributed

STEPS = 4
#: Rows that divide among 2 and 3 ranks, that do not, and fewer than ranks; three dimensions; a vector.
SHAPES: tuple[tuple[int, ...], ...] = ((36, 6), (35, 7), (2, 6), (17, 6, 3), (11,))
SECOND = {
    "rows": RowWise(),
    "sketched rows": RowWise(compression=4),
    "lazy rows": RowWise(lazy=True),
    "lazy sketched rows": RowWise(compression=4, lazy=True),
    "factored": Factored(floor=2.0),
    "SM3": SM3(),
    "SM3-I": SM3("I"),
    "SM3 with momentum": SM3(momentum=0.9),
    "sketch": CountSketch(compression=2, sync=True),
    "lazy sketch": CountSketch(compression=2, lazy=True, sync=True),
}
FIRST = {"dropped": Drop(), "kept": Keep(), "rounded": BFloat16(stochastic=False), "sketch": CountSketch(2, sync=True)}
CASES = (
    Case(AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    Case(Adam, {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    Case(Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}),
    Case(RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
)
#: Relative distance of whole tensors; sketches of ranks of their own are 1e-3 to 0.3 apart (see docs/sharding.md).
ROUNDING = 2e-6


def layers(case: Case) -> list[tuple[str, str, int, tuple[int, ...]]]:
    """Codecs of the first and second moment, sharded dimension and shape of every layer."""
    firsts: tuple[str, ...] = ("dropped",)
    if case.cls in (Adam, AdamW):
        firsts = ("dropped", "rounded", "sketch") if case is CASES[0] else ("kept",)
    return [
        (first, second, dim, shape)
        for second in SECOND
        for first in firsts
        if second in ("rows", "factored", "sketch") or first in ("dropped", "kept")
        if not (second == "SM3 with momentum" and first != "dropped")
        for shape in SHAPES
        for dim in range(min(2, len(shape)))
        if not (len(shape) == 1 and second in ("sketch", "lazy sketch"))
    ]


def make(case: Case, mesh: Any, mesh_dim: int) -> tuple[nn.ParameterDict, Any]:
    generator = torch.Generator().manual_seed(0)
    params, rules = nn.ParameterDict(), []
    for number, (first, second, dim, shape) in enumerate(layers(case)):
        full = torch.randn(shape, generator=generator)
        params[f"p{number}"] = nn.Parameter(full if mesh is None else placed(full, mesh, mesh_dim, dim))
        rules.append(Rule(name=f"p{number}", first_moment=FIRST[first], second_moment=SECOND[second]))
    if case.cls is Adagrad:
        rules = [Rule(name=rule.name, second_moment=rule.second_moment) for rule in rules]
    return params, compress(case.make(params.parameters()), params, Policy(rules))


def placed(full: Tensor, mesh: Any, mesh_dim: int, dim: int) -> Any:
    if mesh.ndim == 1:
        return as_dtensor(full, mesh, dim)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    held = chunk(full, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim), dim)
    placements = [Replicate(), Shard(dim)]
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def gradient(shape: tuple[int, ...], number: int, step: int) -> Tensor:
    """A gradient of which some rows are zero, which is absent under lazy codecs."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    found = torch.randn(shape, generator=generator)
    return found.masked_fill(((torch.arange(shape[0]) + step) % 3 == 0).view(-1, *[1] * (len(shape) - 1)), 0.0)


def train(case: Case, mesh: Any = None, mesh_dim: int = 0) -> dict[str, Any]:
    """This rank's parameters, states and what the layers are decoded to."""
    params, optimizer = make(case, mesh, mesh_dim)
    for step in range(STEPS):
        for number, (param, (_, _, dim, shape)) in enumerate(zip(params.values(), layers(case), strict=True)):
            full = gradient(shape, number, step)
            param.grad = full if mesh is None else placed(full, mesh, mesh_dim, dim)
        optimizer.step()
    held = [param.detach() if mesh is None else param.detach().to_local() for param in params.values()]
    states = [{k: v for k, v in optimizer.state[param].items() if isinstance(v, Tensor)} for param in params.values()]
    return {"params": [x.clone() for x in held], "states": states}


def everything(rank: int, world_size: int) -> list[dict[str, Any]]:
    mesh, mesh_dim = init_device_mesh("cpu", (world_size,)), 0
    if world_size == 4:  # two replicas of two shards
        mesh, mesh_dim = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), 1
    return [train(case, mesh, mesh_dim) for case in CASES]


@functools.cache
def ranks(world_size: int) -> list[list[dict[str, Any]]]:
    return run_ranks(everything, world_size)


@functools.cache
def alone(number: int) -> dict[str, Any]:
    return train(CASES[number])


def assert_close(found: Tensor, expected: Tensor, norm: Tensor, where: str) -> None:
    assert found.shape == expected.shape, where
    distance = float((found - expected).norm())
    assert distance <= ROUNDING * max(float(norm.norm()), 1e-12), f"{where}: {distance / float(norm.norm()):.1e}"


#: Of four, two are replicas.
every_world = pytest.mark.parametrize("world_size", [3, 4])
every_case = pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number}-{CASES[number]}")


@every_case
@every_world
def test_parameters_are_those_of_one_process(world_size, number):
    shards = 2 if world_size == 4 else world_size
    for rank, found in enumerate(ranks(world_size)):
        for i, (first, second, dim, shape) in enumerate(layers(CASES[number])):
            whole, where = alone(number)["params"][i], f"{first}, {second}, dim {dim}, {shape}, rank {rank}"
            expected = chunk(whole, shards, rank % shards, dim)
            assert_close(found[number]["params"][i], expected, whole, where)


#: Accumulators of SM3 are the largest of each rank between steps.
OWN = ("_dim0", "_dim1", "_dim2")


@every_case
@every_world
def test_shared_states_are_those_of_one_process_and_the_same_on_every_rank(world_size, number):
    shards, compared = 2 if world_size == 4 else world_size, 0
    for i, (first, second, dim, shape) in enumerate(layers(CASES[number])):
        for key, expected in alone(number)["states"][i].items():
            for rank, found in enumerate(ranks(world_size)):
                where = f"{key} of {first}, {second}, dim {dim}, {shape}, rank {rank}"
                held = found[number]["states"][i][key]
                if key.endswith("_scale") or key == "step":
                    assert float(held) == float(expected), where
                elif key.endswith("_row") or (key.endswith("_col") and dim == 1):
                    by_rows = key.endswith("_row")
                    axis = 0 if by_rows or len(shape) > 2 or dim == 1 else None
                    cut = (dim == 0) == by_rows and axis is not None
                    part = chunk(expected, shards, rank % shards, axis) if cut else expected
                    assert_close(held, part, expected, where)
                    compared += 1
                elif key.endswith(("_col", "_table")) and held.shape == expected.shape:
                    assert_close(held, expected, expected, where)
                    compared += 1
                    assert torch.equal(held, ranks(world_size)[rank // shards * shards][number]["states"][i][key]), (
                        where
                    )
    assert compared > 50


@every_world
def test_replicas_are_equal_to_the_bit(world_size):
    if world_size == 4:
        first, second, third, fourth = ranks(4)
        for one, other in ((first, third), (second, fourth)):
            for a, b in zip(one, other, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a["params"], b["params"], strict=True))
