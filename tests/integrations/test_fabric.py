"""Lightning Fabric: converted before and after ``fabric.setup``, checkpoints, DDP and FSDP2 (Lightning#18482)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.fabric
import lightning_fabric
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress, decompress, plan, report
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.optimizer.classes import CompressedAdamW
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import local
from tests.ranks import run_ranks_in
from tests.tiny import Tiny, assert_same, snapshot

FABRICS = {"lightning": lightning.fabric.Fabric, "lightning_fabric": lightning_fabric.Fabric}
POLICY = Policy([Rule(name="table.weight", first_moment=BFloat16(), second_moment=RowWise())])
ROWS = 30


def fabric_of(package: str = "lightning", **options: Any) -> Any:
    fabric = FABRICS[package](accelerator="cpu", **{"devices": 1} | options)
    fabric.launch()
    return fabric


def made(fabric: Any, when: str) -> tuple[Any, Any]:
    """Model and optimizer as the training loop has them; compressed ``before`` or ``after`` the setup, or ``never``."""
    torch.manual_seed(0)
    model = Tiny(ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    if when == "before":
        compress(optimizer, model, POLICY)
    wrapped = fabric.setup(model, optimizer)
    if when == "after":
        assert compress(wrapped[1], wrapped[0], POLICY) is wrapped[1]
    return wrapped


def train(fabric: Any, model: Any, optimizer: Any, steps: range, rank: int = 0) -> None:
    for step in steps:
        tokens = torch.randint(ROWS, (8,), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = nn.functional.cross_entropy(model(tokens), tokens % 3)
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()


@pytest.mark.parametrize("package", FABRICS)
def test_rules_by_name_match_and_names_are_the_models(package):
    model, optimizer = made(fabric_of(package), "after")
    assert [layer.fqn for layer in named_layers(model).values()] == ["table.weight", "kept.weight", "kept.bias"]
    assert not any(layer.aliases for layer in named_layers(model).values())
    assert [x.layer.fqn for x in plan(model, optimizer, POLICY).layers if x.layer.compressed] == ["table.weight"]


def test_nested_wrappers_and_parts_leave_no_trace_in_names():
    fabric = fabric_of()
    model = Tiny()
    names = [layer.fqn for layer in named_layers(model).values()]
    for wrapped in (torch.compile(fabric.setup_module(model), backend="eager"), fabric.setup_module(model)):
        assert [layer.fqn for layer in named_layers(wrapped).values()] == names
    parts = nn.ModuleList([fabric.setup_module(Tiny()), nn.DataParallel(Tiny())])
    assert [layer.fqn for layer in named_layers(parts).values()] == [f"{i}.{name}" for i in range(2) for name in names]


@pytest.mark.parametrize("package", FABRICS)
def test_before_and_after_the_setup_is_the_same(package):
    fabric = fabric_of(package)
    found = []
    for when in ("before", "after"):
        model, optimizer = made(fabric, when)
        assert isinstance(optimizer, CompressedAdamW)  # the wrapper imitates its optimizer
        train(fabric, model, optimizer, range(5))
        assert set(report(optimizer).state_by_codec) == {"BFloat16", "Keep", "RowWise"}
        found.append(snapshot(model.module, unwrap(optimizer)))
    assert_same(*found)


@pytest.mark.parametrize("saved", ["before", "after"])
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_checkpoints_of_before_and_after_the_setup_fit_each_other(saved, loaded, tmp_path):
    fabric = fabric_of()
    model, optimizer = made(fabric, saved)
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "checkpoint", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, range(3, 6))
    resumed = made(fabric, loaded)
    fabric.load(tmp_path / "checkpoint", {"model": resumed[0], "optimizer": resumed[1]})
    train(fabric, *resumed, range(3, 6))
    assert_same(snapshot(resumed[0].module, unwrap(resumed[1])), snapshot(model.module, unwrap(optimizer)))


def test_a_plain_checkpoint_resumes_compressed(tmp_path):
    fabric = fabric_of()
    model, optimizer = made(fabric, "never")
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "checkpoint", {"model": model, "optimizer": optimizer})
    resumed = made(fabric, "after")
    fabric.load(tmp_path / "checkpoint", {"model": resumed[0], "optimizer": resumed[1]})
    assert set(report(resumed[1]).conversion_errors["table.weight"]) == {"exp_avg", "exp_avg_sq"}
    train(fabric, *resumed, range(3, 5))


@pytest.mark.parametrize("package", FABRICS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_decompress_gives_the_wrapper_its_class_back(package, when):
    fabric = fabric_of(package)
    model, optimizer = made(fabric, when)
    stock = type(made(fabric, "never")[1])
    train(fabric, model, optimizer, range(2))
    assert decompress(optimizer) is optimizer
    assert type(optimizer).__name__ == stock.__name__ == "FabricAdamW"
    assert [cls.__name__ for cls in type(optimizer).__mro__] == [cls.__name__ for cls in stock.__mro__]
    assert not isinstance(optimizer, CompressedAdamW)
    train(fabric, model, optimizer, range(2, 4))
    compress(optimizer, model, POLICY)
    assert isinstance(optimizer, CompressedAdamW)
    train(fabric, model, optimizer, range(4, 6))


def under_ddp(rank: int, world_size: int) -> list[dict[str, Any]]:
    fabric = fabric_of(devices=world_size, strategy="ddp")
    assert fabric.world_size == world_size
    found = []
    for when in ("before", "after"):
        model, optimizer = made(fabric, when)
        names = [layer.fqn for layer in named_layers(model).values()]
        assert names == ["table.weight", "kept.weight", "kept.bias"]
        train(fabric, model, optimizer, range(4), rank)
        path = Path("ddp", when)
        fabric.save(path, {"model": model, "optimizer": optimizer})
        other = made(fabric, "before" if when == "after" else "after")
        fabric.load(path, {"model": other[0], "optimizer": other[1]})
        found += [snapshot(pair[0].module, unwrap(pair[1])) for pair in ((model, optimizer), other)]
    return found


def parallelize(model: Any, mesh: Any) -> Any:
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def under_fsdp2(rank: int, world_size: int) -> list[dict[str, Any]]:
    strategy = lightning.fabric.strategies.ModelParallelStrategy(
        parallelize_fn=parallelize, data_parallel_size=world_size, tensor_parallel_size=1
    )
    fabric = fabric_of(devices=world_size, strategy=strategy)

    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = fabric.setup_module(Tiny(ROWS))
        optimizer = compress(torch.optim.AdamW(model.parameters(), lr=0.05), model, POLICY)
        return model, fabric.setup_optimizers(optimizer)

    def held(model: Any, optimizer: Any) -> dict[str, Any]:
        states = unwrap(optimizer).state[model.table.weight]
        tensors = {key: local(value) for key, value in states.items() if isinstance(value, Tensor)}
        return tensors | {"weight": local(model.table.weight.detach()).clone()}

    model, optimizer = make()
    assert [layer.fqn for layer in named_layers(model).values()] == ["table.weight", "kept.weight", "kept.bias"]
    train(fabric, model, optimizer, range(3), rank)
    fabric.save("fsdp2", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, range(3, 5), rank)
    resumed = make()
    fabric.load("fsdp2", {"model": resumed[0], "optimizer": resumed[1]})
    train(fabric, *resumed, range(3, 5), rank)
    return [held(model, optimizer), held(*resumed)]


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """As torchrun starts a script; both strategies in one process, because to start it takes longest."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    address = {"GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {key: str(value) for key, value in (place | address).items()}
    return {"ddp": under_ddp(rank, world_size), "fsdp2": under_fsdp2(rank, world_size)}


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    """Before, after and resumed are the same under DDP, whose replicas agree; so is resumed under FSDP2."""
    ranks = run_ranks_in(tmp_path, on_rank, 2)
    for found in (rank[strategy] for rank in ranks for strategy in ("ddp", "fsdp2")):
        for other in found[1:]:
            assert_same(other, found[0])
    assert_same(ranks[1]["ddp"], ranks[0]["ddp"])
    assert [rank["fsdp2"][0]["exp_avg_sq_row"].shape for rank in ranks] == [(ROWS // 2,)] * 2
