"""FSDP2 with tensor parallelism under Lightning's ModelParallelStrategy, as its documentation has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_sketch import compress
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from tests.integrations.lightning_tools import trainer
from tests.ranks import run_ranks_in

ROWS, WIDTH, STEPS, SAVED_AT = 10_000, 8, 6, 4  # the default policy's tables
PLAN = {"table": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}


def words(step: int, replica: int) -> Tensor:
    return torch.randint(ROWS, (2, 8), generator=torch.Generator().manual_seed(10 * step + replica))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.table(tokens)).flatten(0, 1), tokens.flatten())


class Words(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], PLAN)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(words(self.global_step, self.device_mesh["data_parallel"].get_local_rank()))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, foreach=False)


def fit(folder: Path, steps: int, ckpt_path: str | None = None) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "4"}  # as torchrun sets them
    module = Words()
    made = trainer(
        devices=4,
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=2, save_distributed_checkpoint=folder.name == "distributed"
        ),
        callbacks=[OptimizerStateCompression()],
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=0.5,
    )
    made.fit(module, DataLoader(range(4), batch_size=None), ckpt_path=ckpt_path)
    if ckpt_path is None and steps == SAVED_AT:
        made.save_checkpoint(folder)
    state = made.optimizers[0].state[module.net.table.weight]
    return {
        "losses": module.losses,
        "weights": {name: p.full_tensor().detach() for name, p in module.named_parameters()},
        "states": {key: tuple(value.shape) for key, value in state.items()},
    }


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    found = {"whole": fit(Path("none"), STEPS)}
    for name in ("distributed", "full"):
        fit(Path(name), SAVED_AT)
        found[name] = fit(Path(name), STEPS, ckpt_path=name)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks_in(tmp_path_factory.mktemp("checkpoints"), on_rank, 4)


@pytest.mark.distributed
def test_the_default_policy_trains_as_in_one_process(ranks):
    holder = nn.Module()  # names as in `Words`
    holder.net = net = Net()
    optimizer = compress(torch.optim.AdamW(holder.parameters(), lr=0.02), holder)
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(net(words(step, replica)) / 2 for replica in range(2)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    for rank in ranks:
        for name, param in holder.named_parameters():
            torch.testing.assert_close(rank["whole"]["weights"][name], param.detach(), rtol=1e-3, atol=1e-4)
        assert rank["whole"]["states"] == {"step": (), "exp_avg_sq_row": (ROWS // 4,), "exp_avg_sq_col": (WIDTH,),
                                           "exp_avg_sq_scale": ()}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("saved_as", ["distributed", "full"])
def test_a_resumed_fit_is_the_undisturbed_one(ranks, saved_as):
    for rank in ranks:
        assert rank[saved_as]["losses"] == rank["whole"]["losses"][SAVED_AT:]
        for name, expected in rank["whole"]["weights"].items():
            assert torch.equal(rank[saved_as]["weights"][name], expected)
