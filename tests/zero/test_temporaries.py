"""Under ZeRO, too, neither our step nor our state dict makes anything the size of what a rank holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_sketch import BFloat16, CountSketch, Drop, Policy, RowWise, Rule, compress
from lightning_sketch.sharding.base import BLOCK_NUMEL
from tests.checkpoints.allocations import allocated
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROWS, DIM = 4096, 1024
CODECS: dict[str, dict[str, Any]] = {
    "RowWise": {"exp_avg": Drop(), "exp_avg_sq": RowWise()},
    "BFloat16": {"exp_avg": BFloat16(), "exp_avg_sq": RowWise(compression=4)},
    "CountSketch": {"exp_avg": CountSketch(), "exp_avg_sq": CountSketch()},
}
STAGES = (1, 3)
#: Bytes of one block, of the table, and of a rank's half of it.
BLOCK, TABLE = 4 * BLOCK_NUMEL, 4 * ROWS * DIM
SHARD = TABLE // 2


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).square().mean()


@torch.library.custom_op("tests::sum_of_copy", mutates_args=())
def sum_of_copy(x: Tensor) -> Tensor:
    """An operator that makes a temporary inside itself."""
    return x.clone().sum()


def copy_parameters(optimizer: Any, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            sum_of_copy(param.detach())


def measure_case(rank: int, stage: int, codecs: dict[str, Any], folder: str) -> dict[str, list[int]]:
    """Bytes of every allocation in a step, and while the engine saves: in our state dict, and in all."""
    model = Table()
    optimizer: Any = compress(AdamW(model.parameters()), model, Policy([Rule(role="embedding", **codecs)]))
    trained = engine(model, optimizer, stage)
    found: dict[str, list[int]] = {}

    def watched(name: str, method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            result, found[name] = allocated(lambda: method(*args, **kwargs))
            return result

        return run

    def train() -> None:
        trained.backward(trained(torch.arange(rank, ROWS, 7)))
        trained.step()

    train()  # allocates the states
    plain_step = optimizer.step
    optimizer.step = watched("step", plain_step)
    train()
    optimizer.register_step_pre_hook(copy_parameters)
    optimizer.step = watched("copying step", plain_step)
    train()
    _, found["save"] = allocated(lambda: trained.save_checkpoint(folder, tag="all"))
    optimizer.state_dict = watched("state_dict", optimizer.state_dict)
    trained.save_checkpoint(folder, tag="ours")
    return found


def measure(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    return {
        f"stage {stage}, {name}": measure_case(rank, stage, codecs, f"{folder}/{stage} {name}")
        for stage in STAGES
        for name, codecs in CODECS.items()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(measure, 2, str(tmp_path_factory.mktemp("temporaries")))


CASES = [f"stage {stage}, {name}" for stage in STAGES for name in CODECS]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["step", "state_dict", "save"])
def test_nothing_the_size_of_a_shard_is_made(ranks, what, case):
    for rank in ranks:
        assert [size for size in rank[case][what] if size > BLOCK] == []


@pytest.mark.parametrize("case", CASES)
def test_the_measure_sees_a_copy_inside_an_operator(ranks, case):
    for rank in ranks:
        assert [size for size in rank[case]["copying step"] if size > BLOCK] == [SHARD]
