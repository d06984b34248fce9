"""DTensor shards: which rows and columns a rank holds, what is refused, and what a shard's states bound."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_sketch import SM3, CountSketch, Policy, RowWise, Rule, compress, plan
from lightning_sketch.sharding import Shard, global_shape, is_dtensor, local, shard_of
from lightning_sketch.sharding.dtensor import even_shard, ranks_of, sharding_of
from tests.codecs.harness import Driver, make_spec, sparse_steps
from tests.ranks import run_ranks

cases = settings(max_examples=100, deadline=None, derandomize=True, database=None)
WORLD = 4


@cases
@given(
    shape=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple),
    dim=st.integers(0, 1), parts=st.integers(1, 9), data=st.data(),
)  # fmt: skip
def test_even_shards_are_torchs_chunks(shape, dim, parts, data):
    dim = min(dim, len(shape) - 1)
    index = data.draw(st.integers(0, parts - 1))
    shard = even_shard(shape, dim, parts, index)
    ids = torch.arange(torch.Size(shape).numel()).view(shape)
    chunks = ids.chunk(parts, dim)
    held = chunks[index] if index < len(chunks) else ids.narrow(dim, 0, 0)
    assert (shard.local_rows, *shard.row_shape) == held.shape
    assert shard.global_shape == shape
    if held.numel():
        columns = max(1, torch.Size(shape[1:]).numel())
        assert (shard.row_offset, shard.column_offset) == divmod(int(held.flatten()[0]), columns)
    largest = chunks[0].shape[dim]
    assert shard.table_rows == (largest if dim == 0 else shape[0])


@cases
@given(st.integers(0, 40), st.integers(0, 12), st.integers(0, 1), st.integers(1, 9))
def test_even_shards_meet_and_end_at_the_end(rows, columns, dim, parts):
    shards = [even_shard((rows, columns), dim, parts, i) for i in range(parts)]
    edges = [(s.row_offset, s.local_rows) if dim == 0 else (s.column_offset, s.row_numel) for s in shards]
    assert edges[0][0] == 0
    assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(edges))
    assert sum(n for _, n in edges) == (rows, columns)[dim]


def test_all_ranks_tables_have_one_shape():
    for codec in (CountSketch(compression=2), CountSketch(width=7), CountSketch(width=1000)):
        shapes = {codec.table_shape(even_shard((51, 4), 0, 4, i)) for i in range(4)}
        assert len(shapes) == 1, codec


# Real DTensors

ROWS = {"even": (8, 4), "uneven": (9, 5), "fewer rows than ranks": (2, 3), "three dimensions": (7, 4, 3), "1-d": (6,)}


def look(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    grid = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    one_by_all = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("one", "all"))
    found = {"shards": [], "refused": {}, "hsdp": [], "local": []}
    for shape in ROWS.values():
        ids = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        for dim in range(min(2, len(shape))):
            tensor = distribute_tensor(ids, mesh, [Split(dim)])
            found["shards"].append(describe(shard_of(tensor, "w")) | {"of": (shape, dim, world_size, rank)})
            found["local"].append((tensor.to_local(), shape, dim))
            assert sharding_of(tensor, "w") == (world_size, dim)
            assert global_shape(tensor) == shape
            tensor = distribute_tensor(ids, grid, [Replicate(), Split(dim)])
            place = (shape, dim, world_size // 2, rank % 2)
            found["hsdp"].append(describe(shard_of(tensor, "w")) | {"of": place})
            assert sharding_of(tensor, "w") == (2, dim)
        found["replicated"] = describe(shard_of(distribute_tensor(ids, mesh, [Replicate()]), "w"))
        assert sharding_of(distribute_tensor(ids, mesh, [Replicate()]), "w") == (1, 0)
    whole = torch.zeros(4, 4, 4)
    wrong = {
        "two mesh dimensions": distribute_tensor(whole, grid, [Split(0), Split(1)]),
        "strides of none": DTensor.from_local(
            whole, grid, [Replicate(), _StridedShard(0, split_factor=3)], run_check=False
        ),
        "third dimension": distribute_tensor(whole, mesh, [Split(2)]),
        "partial": DTensor.from_local(whole, mesh, [Partial()], run_check=False),
    }
    for name, tensor in wrong.items():
        model = nn.Module()
        model.inner = nn.Embedding(4, 4)
        model.inner.weight = nn.Parameter(tensor)
        optimizer = torch.optim.AdamW(model.parameters())
        for refuse in (
            lambda param=model.inner.weight: shard_of(param, "inner.weight"),
            lambda model=model, optimizer=optimizer: compress_and_step(model, optimizer),
        ):
            try:
                refuse()
                found["refused"].setdefault(name, []).append("")
            except TypeError as error:
                found["refused"].setdefault(name, []).append(str(error))
    bad = DTensor.from_local(torch.zeros(3, 4), mesh, [Split(0)], run_check=False, shape=(8, 4), stride=(4, 1))
    try:
        shard_of(bad, "inner.weight")
    except RuntimeError as error:
        found["mismatch"] = str(error)
    found["both"] = []
    for dim in (0, 1):
        ids = torch.arange(32.0).view(8, 4)
        for placements in ([Split(dim), Split(dim)], [_StridedShard(dim, split_factor=2), Split(dim)]):
            tensor = distribute_tensor(ids, grid, placements)
            assert sharding_of(tensor, "w") == (world_size, dim)
            assert [group.size() for group in ranks_of(tensor, "w")] == [2, 2]
            found["both"].append((describe(shard_of(tensor, "w")), tensor.to_local(), ids))
    found["mesh of one"] = sharding_of(distribute_tensor(torch.zeros(7, 4), one_by_all, [Split(0), Split(0)]), "w")
    found["fsdp"] = shards_of_fsdp2(mesh)
    found["plan"] = str(planned(mesh))
    return found


def compress_and_step(model, optimizer):
    compress(optimizer, model, Policy([Rule(second_moment=RowWise())]))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()


def describe(shard: Shard) -> dict:
    return {name: getattr(shard, name) for name in Shard.__dataclass_fields__}


def shards_of_fsdp2(mesh):
    """What ``fully_shard`` itself makes: rows by default, columns where asked."""
    model = nn.Sequential(nn.Embedding(51, 8), nn.Embedding(17, 8), nn.Linear(3, 2))
    by_columns = model[1].weight
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Split(1 if p is by_columns else 0))
    assert all(is_dtensor(p) for p in model.parameters())
    return {name: describe(shard_of(p, name)) for name, p in model.named_parameters()}


def planned(mesh):
    model = nn.Sequential(nn.Embedding(51, 8), nn.Linear(8, 4))
    fully_shard(model, mesh=mesh)
    policy = Policy([Rule(role="embedding", min_rows=51, second_moment=RowWise())])
    return {x.layer.fqn: list(x.layer.shape) for x in plan(model, torch.optim.AdamW(model.parameters()), policy).layers}


@functools.cache
def ranks():
    return run_ranks(look, WORLD)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["shards", "hsdp"])
def test_a_dtensors_shard_is_the_even_one_of_its_rank(kind):
    for found in ranks():
        assert len(found[kind]) == 9
        for shard in found[kind]:
            shape, dim, parts, index = shard.pop("of")
            assert shard == describe(even_shard(shape, dim, parts, index, agree=True))


@pytest.mark.distributed
def test_the_local_tensor_is_where_the_shard_says():
    for rank, found in enumerate(ranks()):
        for held, shape, dim in found["local"]:
            shard = even_shard(shape, dim, WORLD, rank)
            ids = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape[0], -1)
            rows = ids[shard.row_offset : shard.row_offset + shard.local_rows]
            expected = rows[:, shard.column_offset : shard.column_offset + shard.row_numel]
            assert torch.equal(shard.as_rows(held).flatten(), expected.flatten())


@pytest.mark.distributed
def test_two_mesh_dimensions_may_cut_the_same_dimension_in_either_order():
    held = [found["both"] for found in ranks()]
    for kind in range(4):
        cuts = set()
        for here in held:
            shard, local_tensor, ids = here[kind]
            rows = ids[shard["row_offset"] : shard["row_offset"] + shard["local_rows"]]
            first, width = shard["column_offset"], local_tensor.shape[1]
            assert torch.equal(local_tensor, rows[:, first : first + width])
            assert shard["cut"] == ("rows" if kind < 2 else "columns")
            cuts.add((shard["row_offset"], first))
        assert len(cuts) == WORLD
    assert all(found["mesh of one"] == (WORLD, 0) for found in ranks())


@pytest.mark.distributed
def test_a_replicated_dtensor_is_whole():
    assert all(found["replicated"] == describe(Shard.whole((6,))) for found in ranks())


@pytest.mark.distributed
def test_fully_shards_own_dtensors():
    for rank, found in enumerate(ranks()):
        assert found["fsdp"]["0.weight"] == describe(even_shard((51, 8), 0, WORLD, rank, agree=True))
        assert found["fsdp"]["1.weight"] == describe(even_shard((17, 8), 1, WORLD, rank, agree=True))
        assert found["fsdp"]["2.weight"] == describe(even_shard((2, 3), 0, WORLD, rank, agree=True))
        assert found["fsdp"]["2.bias"] == describe(even_shard((2,), 0, WORLD, rank, agree=True))


@pytest.mark.distributed
def test_policies_decide_on_the_global_shape():
    for found in ranks():
        assert found["plan"] == "{'0.weight': [51, 8], '1.weight': [4, 8], '1.bias': [4]}"


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["two mesh dimensions", "strides of none", "third dimension", "partial"])
def test_other_placements_are_refused_by_name(name):
    for found in ranks():
        by_shard, by_step = found["refused"][name]
        for message in (by_shard, by_step):
            assert message.startswith("inner.weight is a DTensor with placements (")
            assert "Shard(0), FSDP2's default" in message
            assert "keep such layers by a first rule without codecs" in message


@pytest.mark.distributed
def test_a_local_tensor_of_another_shape_is_refused():
    for found in ranks():
        assert "inner.weight: a DTensor of shape [8, 4]" in found["mismatch"]
        assert "should hold [2, 4] here, but holds [3, 4]" in found["mismatch"]


def test_ordinary_tensors_are_no_dtensors():
    tensor = torch.zeros(3, 2)
    assert not is_dtensor(tensor)
    assert local(tensor) is tensor
    assert sharding_of(tensor, "w") == (1, 0)


# What the states of a shard bound, where they are not those of one process


def driven(codec, shard, steps, dim):
    """The state of a shard after some steps of Adagrad, and the exact sum."""
    driver = Driver(codec, make_spec(shard.global_shape, shard=shard))
    for values in steps:
        held = values[shard.row_offset : shard.row_offset + shard.local_rows]
        driver.step(held[:, shard.column_offset : shard.column_offset + shard.row_numel].square())
    return driver.state


def dense_steps(rows, dim):
    found = []
    for ids, values in sparse_steps(rows, dim, 30, rows // 2):
        dense = torch.zeros(rows, dim)
        dense[ids] = values
        found.append(dense)
    return found


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize("dim", [0, 1])
def test_sm3_of_a_shard_is_at_least_the_sum_and_at_most_that_of_the_whole(variant, dim):
    steps = dense_steps(20, 6)
    exact = sum(g.square() for g in steps)
    whole = driven(SM3(variant), Shard.whole((20, 6)), steps, dim)
    parts = [driven(SM3(variant), even_shard((20, 6), dim, 3, i), steps, dim) for i in range(3)]
    sharded = torch.cat(parts, dim=dim)
    assert bool((sharded >= exact * (1 - 1e-6)).all())
    assert bool((sharded <= whole * (1 + 1e-6)).all())
    assert bool((sharded < whole * 0.999).any())


def test_a_count_min_sketch_of_row_shards_never_underestimates():
    steps = dense_steps(20, 6)
    exact = sum(g.square() for g in steps)
    sharded = torch.cat([driven(CountSketch(2), even_shard((20, 6), 0, 3, i), steps, 0) for i in range(3)])
    assert bool((sharded >= exact * (1 - 1e-6)).all())
    assert bool((sharded > exact * 1.001).any())


def test_row_means_of_column_shards_are_means_of_their_part():
    steps = dense_steps(20, 6)
    exact = sum(g.square() for g in steps)
    for index in range(3):
        found = driven(RowWise(), even_shard((20, 6), 1, 3, index), steps, 1)
        part = exact[:, 2 * index : 2 * index + 2].mean(dim=1, keepdim=True)
        torch.testing.assert_close(found, part.expand(20, 2))
