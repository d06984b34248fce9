"""Restoring and converting read rows in blocks: nothing the size of a layer is made beside the new states."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard as ShardPlacement
from torch.optim import AdamW

from lightning_sketch import BFloat16, CountSketch, Drop, Keep, Policy, RowWise, Rule, compress, restore
from lightning_sketch.checkpoints.formats.dcp import Directory
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from lightning_sketch.sharding import local
from lightning_sketch.sharding.base import BLOCK_NUMEL
from tests.checkpoints.allocations import Allocations
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="measures as Linux does")

ROWS, DIM = 2560, 512
LAYERS = ("kept", "beside", "rounded", "sketched")
POLICY = Policy(
    [
        Rule(name="beside.*", exp_avg=Keep(), exp_avg_sq=RowWise()),
        Rule(name="rounded.*", exp_avg=BFloat16(), exp_avg_sq=BFloat16()),
        Rule(name="sketched.*", exp_avg=CountSketch(compression=40), exp_avg_sq=CountSketch(compression=40)),
    ]
)

#: Bytes of one block of float32; half a layer, in bfloat16, is more.
LIMIT = 4 * BLOCK_NUMEL


class Big(nn.Module):
    """Layers of 5 MiB."""

    def __init__(self) -> None:
        super().__init__()
        for name in LAYERS:
            self.add_module(name, nn.Linear(DIM, ROWS, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).square().mean() for layer in self.children()]).sum()


def started(kind: str, policy: Policy | None = POLICY) -> tuple[nn.Module, Any, Any]:
    """Model, optimizer and what `restore` is given, under an engine."""
    torch.manual_seed(0)
    model = Big()
    if kind in ("rows", "columns"):
        dim = 0 if kind == "rows" else 1
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda _: ShardPlacement(dim))
    optimizer: Any = AdamW(model.parameters(), lr=0.01)
    optimizer = optimizer if policy is None else compress(optimizer, model, policy)
    return model, optimizer, engine(model, optimizer, int(kind[-1])) if kind.startswith("zero") else optimizer


def train(model: nn.Module, optimizer: Any, target: Any) -> None:
    x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1))
    if target is optimizer:
        model(x).backward()
        optimizer.step()
    else:
        target.backward(target(x))
        target.step()


def write(rank: int, world_size: int, folder: str) -> None:
    """A checkpoint of each kind, of one step."""
    for kind in ("rows", "columns", "zero1", "zero3"):
        model, optimizer, target = started(kind)
        train(model, optimizer, target)
        path = Path(folder, kind)
        if target is optimizer:
            dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
        else:
            target.save_checkpoint(str(path), tag="step")
    if rank == 0:
        for name, policy in (("single", POLICY), ("plain", None)):
            model, optimizer, target = started("single", policy)
            train(model, optimizer, target)
            torch.save(optimizer.state_dict(), Path(folder, f"{name}.pt"))
            whole = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.save(whole, checkpoint_id=Path(folder, name), no_dist=True)
    dist.barrier()


SOURCES = ("single", "single.pt", "plain", "plain.pt", "rows", "columns", "zero1", "zero3")
#: Under one engine everything is restored; under the others both kinds of file and of states, and other shardings.
MOVES = {
    "rows": SOURCES,
    "columns": ("single", "plain.pt", "rows", "columns", "zero3"),
    "zero3": ("single", "plain.pt", "columns", "zero1", "zero3"),
}


def move(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What every restoring allocated, and the sizes of the new states."""
    tracemalloc.start()  # before gloo's threads have anything to do: see `Allocations`
    init_deepspeed(rank, world_size)
    write(rank, world_size, folder)
    found = {}
    for kind, sources in MOVES.items():
        for source in sources:
            _, optimizer, target = started(kind)
            with Allocations(LIMIT) as made:
                restore(target, Path(folder, source))
            states = [local(value) for state in optimizer.state.values() for value in state.values()
                      if isinstance(value, Tensor)]  # fmt: skip
            found[f"{source} to {kind}"] = {
                "large": made.sizes,
                "states": sorted(state.nbytes for state in states if state.nbytes > LIMIT),
                "python": made.peak_python,
            }
    return found


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("streaming")
    return folder, run_ranks(move, 2, str(folder))


@pytest.mark.distributed
def test_restoring_makes_nothing_large_but_the_new_states(moved):
    for rank in moved[1]:
        assert len(rank) == sum(map(len, MOVES.values()))
        for name, found in rank.items():
            assert found["states"], name
            assert found["large"] == found["states"], name
            assert found["python"] < 4 * LIMIT, name


@pytest.mark.distributed
@pytest.mark.parametrize("source", ["rows", "columns", "single"])
def test_converting_makes_nothing_large_but_the_new_states(moved, tmp_path, source):
    with Allocations(LIMIT):  # modules are imported, some only under a dispatch mode, and are large too
        convert_checkpoint(moved[0] / source, tmp_path / "first", to="plain")
    with Allocations(LIMIT) as made:
        convert_checkpoint(moved[0] / source, tmp_path / "plain", to="plain")
    assert made.sizes == [4 * ROWS * DIM] * 2 * len(LAYERS)
    assert made.peak_python < 4 * LIMIT


def test_the_measure_sees_temporaries():
    with Allocations(LIMIT - 1) as made:
        table = torch.zeros(BLOCK_NUMEL)
        table.view(-1)[:5].add_(1)
        table.double().sum()
        bytearray(LIMIT)
    assert made.sizes == [LIMIT, 2 * LIMIT]
    assert made.peak_python > LIMIT


def bytes_read() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.distributed
def test_some_rows_are_read_without_the_others(moved):
    stored = Directory(moved[0] / "single")
    key = "optimizer.state.kept.weight.exp_avg"
    whole = stored.load([key])[key]
    before = bytes_read()
    lazy = Directory(moved[0] / "single").tensor(key)
    rows = lazy.narrow(0, 1000, 10).read()
    assert bytes_read() - before < whole.nbytes // 50
    assert torch.equal(rows, whole[1000:1010])


def test_lazy_tensors_index_and_narrow_like_tensors(tmp_path):
    saved = {
        "three": torch.randn(7, 5, 3),
        "transposed": torch.randn(6, 9).t(),
        "part": torch.randn(20, 4)[3:9],
        "half": torch.randn(8, 4).bfloat16(),
        "none": torch.empty(0, 4),
        "many": torch.arange(3 * BLOCK_NUMEL).view(-1, 3),
    }
    dcp.save(saved, checkpoint_id=tmp_path / "saved")
    stored = Directory(tmp_path / "saved")
    for name, tensor in saved.items():
        lazy = stored.tensor(name)
        assert (lazy.shape, lazy.dtype, lazy.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
        assert torch.equal(lazy.read(), tensor), name
        if len(tensor):
            assert torch.equal(lazy.narrow(1, 1, 2).narrow(0, 2, 3).read(), tensor[2:5, 1:3]), name
            assert torch.equal(lazy[4].read(), tensor[4]), name
            assert torch.equal(lazy[4].narrow(0, 1, 1).read(), tensor[4, 1:2]), name
    with pytest.raises(IndexError, match="out of range"):
        stored.tensor("three").narrow(0, 5, 3)


def test_a_transposed_parameters_states_are_restored(tmp_path):
    def fresh() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Linear(6, 9)
        model.weight = nn.Parameter(torch.randn(6, 9).t())
        return model, compress(AdamW(model.parameters()), model, Policy([Rule(name="bias", exp_avg=Drop())]))

    model, optimizer = fresh()
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert not optimizer.state[model.weight]["exp_avg"].is_contiguous()
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    other, target = fresh()
    restore(target, tmp_path / "saved")
    assert torch.equal(target.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
