"""Two ranks come to the same figures and do the same, under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from lightning_sketch import CountSketch, Monitor, Policy, RowWise, Rule, compress
from lightning_sketch.integrations.resharding import move, needs_resharding
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.monitor import StateDrift, Threshold
from tests.ranks import run_ranks, run_ranks_in
from tests.tiny import assert_same, snapshot

ROWS, WORLD = 101, 2
POLICY = Policy(
    [
        Rule(name="sketch.*", exp_avg=CountSketch(compression=10), exp_avg_sq=CountSketch(compression=10)),
        Rule(name="synced.*", exp_avg=CountSketch(10, sync=True), exp_avg_sq=CountSketch(10, sync=True)),
        Rule(name="rows.*", first_moment="Drop", second_moment=RowWise(compression=10)),
        Rule(name="narrow.*", first_moment="BFloat16", second_moment=RowWise()),
    ]
)
STRICT = Threshold(1.0, 1.0)


class Tables(nn.Module):
    """Three tables of 101 rows (51 and 50), and one of which nothing is left for rank 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sketch, self.synced, self.rows = (nn.Embedding(ROWS, 4) for _ in range(3))
        self.narrow = nn.Embedding(1, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.sketch(ids) + self.synced(ids) * self.rows(ids) + self.narrow(ids * 0)  # type: ignore[no-any-return]


def give_gradients(model: nn.Module, step: int) -> None:
    """The same on one process, and on the rows that each rank of several holds."""
    for number, param in enumerate(model.parameters()):
        full = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * step + number)) + 1
        param.grad = full
        if hasattr(param, "device_mesh"):
            param.grad = distribute_tensor(full, param.device_mesh, param.placements)


def watch(model: Any, on_drift: str = "log", **options: Any) -> tuple[Any, Monitor]:
    monitor = Monitor(on_drift=on_drift, threshold=STRICT, **{"rows": 2 * ROWS, "every": 2, **options})
    optimizer = AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))
    return compress(optimizer, model, POLICY, monitor=monitor), monitor


def records_of(optimizer: Any) -> list[str]:
    return [record for group in optimizer.param_groups for record in group["compression"]]


def sharded() -> Any:
    return fully_shard(Tables(), mesh=init_device_mesh("cpu", (WORLD,)))


def fsdp2_figures(rank: int, world_size: int) -> dict[str, float]:
    model = sharded()
    optimizer, monitor = watch(model)
    for step in range(4):
        give_gradients(model, step)
        optimizer.step()
    return monitor.figures()


def test_under_fsdp2_figures_are_over_the_rows_of_all_ranks():
    first, second = run_ranks(fsdp2_figures, WORLD)
    assert first == second
    model = Tables()
    optimizer, monitor = watch(model)
    for step in range(4):
        give_gradients(model, step)
        optimizer.step()
    one = monitor.figures()
    assert one.keys() == first.keys()
    for key, value in one.items():
        if "sketch.weight" not in key:  # of which each rank has its own
            assert first[key] == pytest.approx(value, rel=1e-4), key


def copied(model: nn.Module) -> list[Tensor]:
    """What this rank holds of the parameters."""
    return [param.data.to_local().clone() for param in model.parameters()]  # type: ignore[operator]


def fsdp2_widened(rank: int, world_size: int) -> dict[str, Any]:
    model = sharded()
    optimizer, monitor = watch(model, "widen")
    for step in range(5):
        give_gradients(model, step)
        optimizer.step()
    shapes = {
        f"{name}.{key}": list(value.shape)
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
        if key.endswith("table")
    }
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(state, "optimizer.pt")
    dist.barrier()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id="sharded")
    dist.barrier()
    optimizer.compression.watcher = None
    give_gradients(model, 7)
    before = copied(model)
    optimizer.step()
    # Into optimizers of the policy that the run began with, as trainers do: the next step is the same bits.
    same: list[bool] = []
    for path in (Path("optimizer.pt"), Path("sharded")):
        other = sharded()
        for param, values in zip(other.parameters(), before, strict=True):
            param.data.to_local().copy_(values)
        resumed, _ = watch(other)
        same.append(needs_resharding([resumed], [(path, 0)]))
        move([resumed], [(path, 0)])
        same.append(records_of(resumed) == records_of(optimizer))
        give_gradients(other, 7)
        resumed.step()
        same += [torch.equal(*pair) for pair in zip(copied(other), copied(model), strict=True)]
    return {"figures": monitor.figures(), "shapes": shapes, "records": records_of(optimizer), "same": same}


def test_under_fsdp2_all_ranks_widen_alike_and_checkpoints_load_under_the_first_policy(tmp_path):
    first, second = run_ranks_in(tmp_path, fsdp2_widened, WORLD)
    assert first["figures"] == second["figures"]
    assert first["records"] == second["records"]
    assert first["shapes"] == second["shapes"]
    assert first["shapes"]["sketch.weight.exp_avg_table"] == [3, 8, 4]  # 51 rows: 2 buckets, then 4 and 8
    assert first["shapes"]["synced.weight.exp_avg_table"] == [3, 16, 4]  # 101 rows: 4, 8, 16
    assert first["same"] == second["same"] == [True] * 12
    narrow = next(record for record in first["records"] if "narrow" in record)
    assert LayerRecord.from_record(narrow).decided is None


def ddp(rank: int, world_size: int, on_drift: str) -> dict[str, Any]:
    model = DistributedDataParallel(Tables())
    optimizer, monitor = watch(model, on_drift, rows=16)
    data = torch.Generator().manual_seed(rank)
    for _ in range(6):
        ids = torch.randint(0, ROWS, (20,), generator=data)
        (model(ids) * torch.randn(20, 4, generator=data)).sum().backward()
        try:
            optimizer.step()
        except StateDrift as error:
            return {"error": str(error)}
        optimizer.zero_grad()
    return {"figures": monitor.figures(), "training": snapshot(model, optimizer), "records": records_of(optimizer)}


@pytest.mark.parametrize("on_drift", ["widen", "keep", "raise"])
def test_replicas_under_ddp_do_the_same(on_drift):
    first, second = run_ranks(ddp, WORLD, on_drift)
    assert_same(first, second)
    if on_drift == "raise":
        assert "sketch.weight: " in first["error"]
    else:
        assert any('"decided"' in record for record in first["records"])


def pipeline(rank: int, world_size: int) -> list[str]:
    """The first stage has a table, the second nothing that is compressed."""
    model = nn.Embedding(ROWS, 4) if rank == 0 else nn.Linear(4, 4)
    monitor = Monitor(rows=8, every=2)
    policy = Policy([Rule(role="embedding", exp_avg_sq=RowWise(), optional=True), Rule(optional=True)])
    optimizer = compress(AdamW(model.parameters()), model, policy, allow_empty=True, monitor=monitor)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(8) if rank == 0 else torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return sorted(monitor.figures())


def test_stages_of_a_pipeline_without_compressed_layers_take_part():
    first, second = run_ranks(pipeline, 2)
    assert first == second
    assert "optimizer_state/weight/update_cosine" in first
