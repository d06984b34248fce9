"""FSDP2 over tensor parallelism, on two by two ranks: what is cut by rows in both ways trains as in one process."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import AdamW

from lightning_sketch import (
    SM3,
    BFloat16,
    CountSketch,
    Drop,
    Factored,
    Policy,
    RowWise,
    Rule,
    compress,
    report,
    restore,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROWS, WIDTH, STEPS = 40, 8, 5
HALF = BFloat16(stochastic=False)
#: By table; all are one process's but for the order of sums: ranks agree, or need not.
TABLES: dict[str, dict[str, Any]] = {
    "default": {"exp_avg": Drop(), "exp_avg_sq": Factored(floor=1.0)},
    "rows": {"exp_avg": HALF, "exp_avg_sq": RowWise()},
    "sm3": {"exp_avg": Drop(), "exp_avg_sq": SM3()},
    "synced": {"exp_avg": Drop(), "exp_avg_sq": CountSketch(compression=3, sync=True)},
    "exact": {"exp_avg": CountSketch(width=1 << 20), "exp_avg_sq": CountSketch(width=1 << 20)},
}
RULES = [Rule(name=f"tables.{name}.weight", **codecs) for name, codecs in TABLES.items()]
POLICY = Policy([*RULES, Rule(name="head.weight", **TABLES["default"]), Rule(name="up.weight", **TABLES["rows"])])
PLAN = {
    **{f"tables.{name}": RowwiseParallel(input_layouts=Replicate()) for name in TABLES},
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
REPLICAS = 2  # of the model, with data of their own


class Net(nn.Module):
    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, WIDTH) for name in TABLES})
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, rows)

    def forward(self, tokens: Tensor) -> Tensor:
        found = sum(table(tokens) for table in self.tables.values())
        logits: Tensor = self.head(self.down(self.up(found).relu()))
        return logits


def loss_of(model: nn.Module, replica: int, step: int) -> Tensor:
    tokens = torch.randint(ROWS, (2, 8), generator=torch.Generator().manual_seed(10 * step + replica))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def optimizer_of(model: nn.Module) -> AdamW:
    return compress(AdamW(model.parameters(), lr=0.01, foreach=False), model, POLICY)  # foreach mixes no DTensors


def train(model: nn.Module, optimizer: AdamW, replica: int | None = None) -> None:
    """On a replica's own data; in one process on that of all."""
    for step in range(STEPS):
        optimizer.zero_grad()
        for each in range(REPLICAS) if replica is None else (replica,):
            (loss_of(model, each, step) / (REPLICAS if replica is None else 1)).backward()
        optimizer.step()


def alone() -> tuple[nn.Module, AdamW]:
    model = Net()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    return model, optimizer


def divided(rows: int = ROWS) -> tuple[nn.Module, int]:
    """The model under FSDP2 and tensor parallelism, and which replica's data are this rank's."""
    mesh = init_device_mesh("cpu", (REPLICAS, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(Net(rows), mesh["tensor"], PLAN)
    return fully_shard(model, mesh=mesh["data"], reshard_after_forward=False), mesh["data"].get_local_rank()


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else torch.as_tensor(tensor)
    return whole.detach().clone()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(param) for name, param in model.named_parameters()}


def states(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """By parameter and key, scales multiplied in; of kept layers whole."""
    found = {}
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        for key, value in state.items():
            scale = state.get(f"{key.rpartition('_')[0]}_scale", 1.0)
            found[f"{name}.{key}"] = full(value) if key.endswith("_scale") else full(value) * float(scale)
    return {key: value for key, value in found.items() if not key.endswith("_scale")}


def on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    model, replica = divided()
    optimizer = optimizer_of(model)
    train(model, optimizer, replica)
    found: dict[str, Any] = {"trained": parameters(model), "held": report(optimizer).state_by_codec}
    found["states"] = states(model, optimizer)

    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=Path(folder, "grid"))
    gathered = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(gathered, Path(folder, "gathered.pt"))

    other, _ = divided()
    loaded = optimizer_of(other)
    stored = {"optimizer": get_optimizer_state_dict(other, loaded)}
    dcp.load(stored, checkpoint_id=Path(folder, "grid"))
    set_optimizer_state_dict(other, loaded, stored["optimizer"])
    found["loaded"] = states(other, loaded)
    for name in ("grid", "alone.pt"):
        restored = optimizer_of(other)
        restore(restored, Path(folder, name))
        found[name] = states(other, restored)
    found["refused"] = [refused(*case) for case in (("down.weight", ROWS), ("tables.rows.weight", ROWS - 2))]
    return found


def refused(name: str, rows: int) -> str:
    model, _ = divided(rows)
    with pytest.raises(TypeError) as error:
        compress(AdamW(model.parameters()), model, Policy([Rule(name=name, second_moment=RowWise())]))
    return str(error.value)


@functools.cache
def trained() -> dict[str, Any]:
    """What one process came to, what the ranks did, and what one process makes of their checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = alone()
        torch.save(optimizer.state_dict(), Path(folder, "alone.pt"))
        found = {"trained": parameters(model), "states": states(model, optimizer)}
        found["held"] = report(optimizer).state_by_codec
        found["ranks"] = run_ranks(on_rank, 2 * REPLICAS, folder)
        for name in ("grid", "gathered.pt"):
            other = Net()
            moved = optimizer_of(other)
            restore(moved, Path(folder, name))
            found[name] = states(other, moved)
        return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], keys: Iterable[str]) -> None:
    for key in keys:
        apart = float((found[key] - expected[key]).norm() / expected[key].norm().clamp_min(1e-12))
        assert apart <= 1e-4, (key, apart)


def test_they_train_as_one_process_does():
    one = trained()
    for rank in one["ranks"]:
        assert_close(rank["trained"], one["trained"], one["trained"])


def test_shared_states_are_those_of_one_process_on_every_rank():
    one = trained()
    shared = ["tables.default.weight.exp_avg_sq_col", "tables.synced.weight.exp_avg_sq_table"]
    for rank in one["ranks"]:
        assert_close(rank["states"], one["states"], shared)


def test_every_rank_holds_its_share_of_rows():
    one = trained()
    for codec in ("RowWise", "BFloat16"):
        held = [rank["held"][codec] for rank in one["ranks"]]
        assert len(set(held)) == 1
        assert held[0] <= one["held"][codec] / 4 + 16  # scales


@pytest.mark.parametrize("source", ["loaded", "grid"])
def test_as_many_ranks_load_what_they_had(source):
    for rank in trained()["ranks"]:
        assert rank[source].keys() == rank["states"].keys()
        for key, expected in rank["states"].items():
            assert torch.equal(rank[source][key], expected), key


@pytest.mark.parametrize("file", ["grid", "gathered.pt"])
def test_their_checkpoint_moves_to_one_process_and_back(file):
    """With layers that are cut by rows and by columns, and kept."""
    one = trained()
    assert one[file].keys() == one["states"].keys()
    own = ["tables.sm3.weight.exp_avg_sq_dim1"]  # the largest of each rank's
    assert_close(one[file], one["states"], one["states"].keys() - own)
    for rank in one["ranks"]:
        for key in ("down.weight.exp_avg_sq", "head.bias.exp_avg", "tables.default.weight.exp_avg_sq_col"):
            torch.testing.assert_close(rank["alone.pt"][key], one["states"][key], rtol=0, atol=0)


def test_what_is_cut_both_ways_or_unevenly_is_refused_by_name():
    for rank in trained()["ranks"]:
        both, unevenly = rank["refused"]
        assert both.startswith("down.weight is a DTensor with placements (Shard(dim=0), Shard(dim=1)). ")
        assert "not by both at once" in both
        assert unevenly.startswith("tables.rows.weight is a DTensor with placements (_StridedShard(dim=0")
        assert "over 4 ranks, which do not divide its 38 rows evenly. Pad it to a multiple of 4" in unevenly
