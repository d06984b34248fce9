"""Checkpoints that versions wrote whose ranks did not agree: `restore` converts them, and says how exactly."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.optim import AdamW

from lightning_sketch import SM3, Drop, Factored, Policy, RowWise, Rule, compress, decompress, report, restore
from lightning_sketch.integrations.resharding import needs_resharding
from lightning_sketch.sharding import dtensor, local
from tests.fsdp2.tools import COLUMNS, ROWS
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

CODECS = {"sketched": RowWise(compression=4), "factored": Factored(), "rows": RowWise(), "sm3": SM3()}


class Tables(nn.Module):
    """Two tables of every codec, one divided by rows and one by columns."""

    def __init__(self) -> None:
        super().__init__()
        for cut in ("by_rows", "by_columns"):
            tables = {name: nn.Embedding(ROWS, COLUMNS) for name in CODECS}
            setattr(self, cut, nn.ModuleDict(tables))


def make(mesh: Any, *, plain: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = Tables()
    if mesh is not None:
        columns = {id(table.weight) for table in model.by_columns.values()}
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if id(p) in columns else 0))
    optimizer = AdamW(model.parameters(), lr=0.1)
    return model, optimizer if plain else compress(optimizer, model, policy())


def policy() -> Policy:
    return Policy([Rule(name=f"*.{name}.weight", exp_avg=Drop(), exp_avg_sq=codec) for name, codec in CODECS.items()])


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for number, param in enumerate(model.parameters()):
            full = torch.randn(tuple(param.shape), generator=torch.Generator().manual_seed(100 * step + number))
            param.grad = full
            if hasattr(param, "placements"):
                param.grad = dtensor_of(full, param)
        optimizer.step()


def dtensor_of(full: torch.Tensor, param: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)


def states(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": local(value).clone()
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
        if key != "step"
    }


def older(rank: int, world_size: int, folder: str) -> None:
    """Write a checkpoint as ranks do that do not agree."""
    original = dtensor.even_shard
    dtensor.even_shard = lambda *args, agree: original(*args, agree=False)
    mesh = init_device_mesh("cpu", (world_size,))
    model, optimizer = make(mesh)
    train(model, optimizer, range(3))
    weights, saved = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": saved}, checkpoint_id=folder)
    dtensor.even_shard = original


def newer(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    model, optimizer = make(mesh)
    found: dict[str, Any] = {"moves": needs_resharding([optimizer], [(Path(folder), 0)])}
    found["errors"] = restore(optimizer, folder)
    found["states"] = states(model, optimizer)
    train(model, optimizer, range(3, 4))
    own = f"{folder} {world_size}"
    weights, saved = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": saved}, checkpoint_id=own)
    dist.barrier()
    again, other = make(mesh)
    found["again"] = {"moves": needs_resharding([other], [(Path(own), 0)]), "errors": restore(other, own)}
    found["before"], found["after"] = states(model, optimizer), states(again, other)
    return found


def midway(rank: int, world_size: int) -> dict[str, Any]:
    """Plain AdamW's states, encoded in the middle of training; the reported errors and the states."""
    mesh = init_device_mesh("cpu", (world_size,))
    model, optimizer = make(mesh, plain=True)
    train(model, optimizer, range(2))
    compress(optimizer, model, policy())
    found = {"states": states(model, optimizer), "errors": dict(report(optimizer).conversion_errors)}
    decompress(optimizer)
    return found


@functools.cache
def ranks(world_size: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(older, 2, f"{folder}/old")
        return run_ranks(newer, world_size, f"{folder}/old")


every_world = pytest.mark.parametrize("world_size", [2, 3])


@every_world
def test_restore_converts_them_and_reports_the_error(world_size):
    for found in ranks(world_size):
        assert found["moves"], "the engine's own loading would not do"
        errors = {name: by_state["exp_avg_sq"] for name, by_state in found["errors"].items()}
        assert errors["by_rows.sketched.weight"] > 1e-3
        assert errors["by_rows.factored.weight"] > 1e-3
        assert all(value.isfinite().all() for value in found["states"].values())
        first = ranks(world_size)[0]["states"]
        for key in ("by_rows.sketched.weight.exp_avg_sq_table", "by_columns.sketched.weight.exp_avg_sq_table",
                    "by_rows.factored.weight.exp_avg_sq_col", "by_columns.rows.weight.exp_avg_sq_row"):  # fmt: skip
            assert torch.equal(found["states"][key], first[key]), key


@every_world
def test_what_is_written_then_moves_without_error(world_size):
    for found in ranks(world_size):
        assert not found["again"]["moves"]
        assert all(error < 1e-6 for by_state in found["again"]["errors"].values() for error in by_state.values())
        for key, value in found["before"].items():
            if "sm3" not in key:  # whose accumulators are each rank's own
                assert torch.equal(found["after"][key], value), key


def test_dense_states_are_encoded_as_one_process_does():
    whole, alone = make(None, plain=True)
    train(whole, alone, range(2))
    compress(alone, whole, policy())
    expected = states(whole, alone)
    for found in run_ranks(midway, 2):
        for key in ("by_rows.sketched.weight.exp_avg_sq_table", "by_columns.sketched.weight.exp_avg_sq_table",
                    "by_rows.factored.weight.exp_avg_sq_col", "by_columns.factored.weight.exp_avg_sq_row",
                    "by_columns.rows.weight.exp_avg_sq_row"):  # fmt: skip
            torch.testing.assert_close(found["states"][key], expected[key], rtol=1e-5, atol=1e-9)
        assert found["errors"].keys() >= {"by_rows.sketched.weight", "by_columns.factored.weight"}
