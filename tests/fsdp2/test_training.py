"""DTensor shards with prescribed gradients against one process: every codec, optimizer, cut and number of ranks."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Keep, Policy, RowWise, Rule, compress, report
from lightning_sketch.sharding.base import BLOCK_NUMEL
from tests.fsdp2.tools import as_dtensor, chunk, codecs_for, keys, train_layers, train_shard
from tests.profiled import peak_bytes
from tests.ranks import run_ranks
from tests.tiny import ADAMW, CASES, assert_same

pytestmark = pytest.mark.distributed

SHARDABLE = [case for case in CASES if not case.sparse]  # FSDP2 reduces gradients densely
STEPS = {str(case): 12 if case is ADAMW else 5 for case in SHARDABLE}

#: What equals one process bit for bit, by the dimension that is sharded. Everything else that is not SHARED has states
#: that differ between ranks: it equals each rank's part trained alone, bit for bit.
EXACT = {0: {"exact", "bfloat16", "rows"}, 1: {"exact", "bfloat16", "sketch", "paper"}}
#: SGD keeps a first moment only, and "rows" drops it: nothing is left that could differ.
EXACT_SGD = {0: EXACT[0], 1: EXACT[1] | {"rows"}}
#: Whose ranks agree, so that they are one process's up to rounding: see test_shared_states.py.
SHARED = {"rows", "sketched rows", "factored", "SM3", "SM3-I momentum"}

every_case = pytest.mark.parametrize("case", SHARDABLE, ids=str)
every_world = pytest.mark.parametrize("world_size", [1, 3, 4])


def train_here(rank, world_size):
    """Train all layers of every optimizer on this rank; local parameters and states."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = {}
    for case in SHARDABLE:
        model, optimizer = train_layers(case, STEPS[str(case)], mesh)
        found[str(case)] = {
            "params": [param.detach().to_local() for param in model.parameters()],
            "states": [optimizer.state[param] for param in model.parameters()],
        }
    return found | {"errors": unusual(mesh), "bytes": big_tables(mesh), "empty": nothing_anywhere(mesh)}


@functools.cache
def ranks(world_size):
    return run_ranks(train_here, world_size)


@functools.cache
def alone(case_name):
    case = next(case for case in SHARDABLE if str(case) == case_name)
    return train_layers(case, STEPS[case_name])


@every_case
@every_world
def test_exact_codecs_equal_one_process_bit_for_bit(world_size, case):
    exact = EXACT_SGD if str(case) == "SGD" else EXACT
    model, _ = alone(str(case))
    compared = set()
    for position, ((codec, dim, shape), param) in enumerate(zip(keys(case), model.parameters(), strict=True)):
        if codec in exact[dim]:
            compared.add((codec, dim))
            for rank, found in enumerate(ranks(world_size)):
                expected = chunk(param.detach(), world_size, rank, dim)
                assert_same(found[str(case)]["params"][position], expected, f"{codec}, dim {dim}, {shape}, rank {rank}")
    assert len(compared) == sum(codec in exact[dim] for codec in codecs_for(case) for dim in (0, 1)) > 0


@every_case
def test_one_rank_is_one_process(case):
    model, optimizer = alone(str(case))
    (found,) = ranks(1)
    for position, param in enumerate(model.parameters()):
        assert_same(found[str(case)]["params"][position], param.detach())
        assert_same(found[str(case)]["states"][position], dict(optimizer.state[param]))


@every_case
@pytest.mark.parametrize("world_size", [3, 4])
def test_every_rank_equals_its_part_trained_alone_bit_for_bit(world_size, case):
    _, optimizer = alone(str(case))
    exact = EXACT_SGD if str(case) == "SGD" else EXACT
    for position, (codec, dim, shape) in enumerate(keys(case)):
        if codec in exact[dim] or codec in SHARED or (case is ADAMW and shape not in [(51, 6), (2, 5)]):
            continue  # two shapes are enough
        for rank, found in enumerate(ranks(world_size)):
            param, state = train_shard(case, optimizer, position, world_size, rank, STEPS[str(case)])
            where = f"{codec}, dim {dim}, {shape}, rank {rank}"
            assert_same(found[str(case)]["params"][position], param, where)
            assert_same(found[str(case)]["states"][position], state, where)


@every_case
def test_ranks_without_rows_hold_nothing_and_step_with_the_others(case):
    fewer = [i for i, (_, dim, shape) in enumerate(keys(case)) if dim == 0 and shape[0] < 4]
    assert fewer
    for position in fewer:
        states = [found[str(case)]["states"][position] for found in ranks(4)]
        assert [found[str(case)]["params"][position].shape[0] for found in ranks(4)] == [1, 1, 0, 0]
        for state in states:
            assert float(state["step"]) == STEPS[str(case)]


# Memory

ROWS, DIM = 4096, 16
TABLES = {
    "kept first moment": {"exp_avg": Keep(), "exp_avg_sq": BFloat16()},
    "sketch": {"exp_avg": CountSketch(compression=4), "exp_avg_sq": CountSketch(compression=20)},
    "rows": {"exp_avg": Drop(), "exp_avg_sq": RowWise()},
    "sketched rows": {"exp_avg": BFloat16(), "exp_avg_sq": RowWise(compression=10)},
    "SM3": {"exp_avg": Drop(), "exp_avg_sq": SM3()},
    "factored": {"exp_avg": Drop(), "exp_avg_sq": Factored()},
}
#: Under column shards every rank has every row, so what is kept by row is kept by every rank.
BY_ROW = {"rows", "sketched rows", "SM3", "factored"}


def big_tables(mesh):
    """State bytes on this rank of each codec and cut."""
    found = {}
    for name, codecs in TABLES.items():
        for dim in (0, 1):
            torch.manual_seed(0)
            table = nn.Embedding(ROWS, DIM)
            if mesh is not None:
                table.weight = nn.Parameter(as_dtensor(table.weight.detach(), mesh, dim))
            optimizer = compress(torch.optim.AdamW(table.parameters()), table, Policy([Rule(**codecs)]))
            table.weight.grad = torch.zeros_like(table.weight)
            optimizer.step()
            found[f"{name}, dim {dim}"] = report(optimizer).state
    return found


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", TABLES)
def test_state_per_rank_is_the_single_process_state_over_the_ranks(name, dim, world_size):
    one = big_tables(None)[f"{name}, dim {dim}"]
    share = -(-(ROWS, DIM)[dim] // world_size) / (ROWS, DIM)[dim]  # of the fullest rank
    for found in ranks(world_size):
        here = found["bytes"][f"{name}, dim {dim}"]
        if dim == 1 and name in BY_ROW:
            by_row = 4 * ROWS // (10 if name == "sketched rows" else 1)
            assert by_row <= here <= one
        else:
            assert here <= (share + 0.01) * one


def temporaries(mesh):
    """Peak bytes allocated by a step and by ``state_dict``, the step's bound, and the local parameter's bytes."""
    found = []
    for dim in (0, 1):
        for codecs in ({"exp_avg": BFloat16(), "exp_avg_sq": CountSketch()}, {"exp_avg": Drop(), "exp_avg_sq": SM3()}):
            table = nn.Embedding(10 * BLOCK_NUMEL * mesh.size() // 64, 64)
            table.weight = nn.Parameter(as_dtensor(table.weight.detach(), mesh, dim))
            optimizer = compress(torch.optim.AdamW(table.parameters()), table, Policy([Rule(**codecs)]))
            table.weight.grad = torch.ones_like(table.weight)
            optimizer.step()  # allocates the states
            peaks = [peak_bytes(optimizer.step), peak_bytes(optimizer.state_dict)]
            found.append([*peaks, report(optimizer).transient, table.weight.to_local().nbytes])
    return found


def test_neither_step_nor_state_dict_allocates_what_grows_with_the_table():
    for found in run_ranks(measure, 2):
        for step, saving, bound, held in found:
            assert 0 < step <= bound
            assert saving < held / 1000


def measure(rank, world_size):
    return temporaries(init_device_mesh("cpu", (world_size,)))


# Gradients that are not finite, and ranks that hold nothing


def pair(mesh, nonfinite):
    """A row-sharded and a column-sharded table that trained for a step, and their copies."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Embedding(12, 4) for _ in range(2))
    for dim, table in enumerate(model):
        table.weight = nn.Parameter(as_dtensor(table.weight.detach(), mesh, dim))
    optimizer = compress(
        torch.optim.AdamW(model.parameters(), lr=0.1),
        model,
        Policy([Rule(first_moment=BFloat16(), second_moment=RowWise())]),
        nonfinite=nonfinite,
    )
    for table in model:
        table.weight.grad = torch.ones_like(table.weight)
    optimizer.step()
    before = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[t.weight].items()}
        | {"param": t.weight.detach().to_local().clone()}
        for t in model
    ]
    return model, optimizer, before


def unusual(mesh):
    """What happens to each table when the last rank alone has a NaN in the row-sharded one."""
    found = {}
    for nonfinite in ("raise", "skip", "propagate"):
        model, optimizer, before = pair(mesh, nonfinite)
        if mesh.get_local_rank() == mesh.size() - 1:
            model[0].weight.grad.to_local()[0, 0] = torch.nan
        message = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                optimizer.step()
            except FloatingPointError as error:
                message = str(error)
        table = model[0].weight.detach().to_local()
        same_rows = (table == before[0]["param"]).all(dim=1).tolist()
        finite = all(bool(torch.as_tensor(x).isfinite().all()) for x in optimizer.state[model[0].weight].values())
        for table in model:
            table.weight.grad = torch.ones_like(table.weight)
        optimizer.step()
        found[nonfinite] = {
            "message": message,
            "same rows": same_rows,
            "finite": finite,
            "steps": [float(optimizer.state[t.weight]["step"]) for t in model],
            "skipped": dict(report(optimizer).skipped),
        }
    return found


@every_world
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_rank_leaves_out_its_own_rows_and_all_ranks_step_everything_else(world_size, nonfinite):
    for rank, found in enumerate(ranks(world_size)):
        outcome, bad = found["errors"][nonfinite], rank == world_size - 1
        assert outcome["same rows"] == [bad and row == 0 for row in range(12 // world_size)]
        assert outcome["steps"] == [3, 3], "counts and decay stay alike on all ranks"
        assert outcome["finite"]
        raised = "NaN or inf in the gradient of 0.weight (1 row). They were left out" in outcome["message"]
        assert raised == (bad and nonfinite == "raise"), "ranks whose rows are finite know nothing of it"
        assert outcome["skipped"] == ({"0.weight": 1} if bad and nonfinite == "skip" else {})


@every_world
def test_propagate_leaves_nothing_out(world_size):
    for rank, found in enumerate(ranks(world_size)):
        outcome = found["errors"]["propagate"]
        assert (outcome["message"], outcome["steps"], any(outcome["same rows"])) == ("", [3, 3], False)
        assert outcome["finite"] == (rank < world_size - 1)


def nothing_anywhere(mesh):
    """A compressed parameter without a gradient, then without elements."""
    model = nn.ParameterList([nn.Parameter(as_dtensor(torch.zeros(shape), mesh, 0)) for shape in [(6, 3), (0, 3)]])
    optimizer = compress(torch.optim.Adam(model.parameters()), model, Policy([Rule(second_moment=RowWise())]))
    optimizer.step()
    untouched = len(optimizer.state)
    for param in model:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return [untouched, len(optimizer.state), *(float(x.detach().to_local().abs().sum()) for x in model)]


@every_world
def test_no_gradient_and_no_element_are_no_error(world_size):
    assert all(found["empty"] == [0, 2, 0.0, 0.0] for found in ranks(world_size))
