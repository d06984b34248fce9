"""Two optimizers by manual optimization under Lightning's FSDP2: each is saved and resumed with its own states."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_sketch import BFloat16, CountSketch, Drop, Policy, RowWise, Rule
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from tests.integrations.lightning_tools import trainer
from tests.ranks import run_ranks_in
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed

WORLD, OTHER_WORLD = 2, 3
ROWS, DIM = 51, 6  # 26 and 25 rows
STEPS, SAVED_AT = 8, 5
FORMATS = ("full", "distributed")
POLICY = Policy(
    [
        Rule(name="net.words.weight", first_moment=BFloat16(), second_moment=RowWise()),
        Rule(name="net.pairs.weight", first_moment=CountSketch(3), second_moment=CountSketch(3)),
        Rule(name="net.hidden.weight", first_moment=Drop(), second_moment=RowWise()),
    ]
)


class Net(nn.Module):
    """Each of two tables belongs to another optimizer, and so do the two layers after them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, DIM)
        self.pairs = nn.Embedding(ROWS, DIM)
        self.hidden = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 17)

    def forward(self, ids: Tensor) -> Tensor:
        features = self.words(ids) + self.pairs(ids.roll(1))
        return nn.functional.cross_entropy(self.head(self.hidden(features).tanh()), ids % 17)


def draw(step: int, rank: int) -> Tensor:
    """Word ids ``[8]``, mostly small ones; every rank has its own."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (torch.rand(8, generator=generator) ** 2 * ROWS).long()


class Pair(LightningModule):
    """Steps two optimizers of different classes by hand. Lightning counts a global step for each."""

    def __init__(self, seed: int, ordered: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.automatic_optimization = False
        self.ordered = ordered  # whether the second optimizer has its layers in the model's order
        self.net = Net()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        net = self.net
        first = torch.optim.AdamW([*net.words.parameters(), *net.hidden.parameters()], lr=0.02)
        layers = (net.pairs, net.head) if self.ordered else (net.head, net.pairs)
        second = torch.optim.RMSprop([p for layer in layers for p in layer.parameters()], lr=0.01, momentum=0.5)
        return [first, second], [StepLR(first, 1, gamma=0.9), StepLR(second, 2, gamma=0.5)]

    def training_step(self, batch: Tensor, index: int) -> None:
        loss = self.net(draw(self.global_step // 2, self.global_rank))
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.losses.append(loss.item())


class Watch(Callback):
    """Save at step `SAVED_AT`, and keep what training starts from."""

    def __init__(self, save_to: str | None) -> None:
        self.save_to = save_to
        self.start: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def on_train_start(self, trainer, pl_module):
        self.start = shards(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.save_to and trainer.global_step == 2 * SAVED_AT:
            trainer.save_checkpoint(self.save_to)
            self.saved = shards(trainer, pl_module)


def shards(made: Any, module: Any) -> dict[str, Any]:
    """What this rank holds: copies of its parts of all parameters, and of their states in whichever optimizer."""
    held: dict[str, Any] = {"lrs": [optimizer.param_groups[0]["lr"] for optimizer in made.optimizers]}
    for name, param in module.named_parameters():
        held[name] = param.to_local().detach().clone()
        for optimizer in made.optimizers:
            for key, value in optimizer.state.get(param, {}).items():
                local = value.to_local() if hasattr(value, "to_local") else value
                held[f"{name}.{key}"] = local.clone() if isinstance(local, Tensor) else local
    return held


def fit(saved_as: str, policy: Policy | None = POLICY, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Train; `options` are ``save_to``, ``ckpt_path`` and ``ordered``."""
    # The variables that torchrun sets: Lightning then starts no processes of its own. It deletes some of them.
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    module, watch = Pair(seed, options.get("ordered", True)), Watch(options.get("save_to"))
    full = saved_as == "full"
    made = trainer(
        devices=world,
        strategy=ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=not full
        ),
        callbacks=[*([OptimizerStateCompression(policy, log_memory=False)] if policy else []), watch],
        max_steps=2 * STEPS,
        max_epochs=-1,
    )
    made.fit(module, DataLoader(range(4), batch_size=None), ckpt_path=options.get("ckpt_path"))
    return {
        "losses": module.losses,
        "start": watch.start,
        "saved": watch.saved,
        "end": shards(made, module),
        "classes": [type(optimizer).__qualname__ for optimizer in made.optimizers],
    }


def every_case(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for saved_as in FORMATS:
        plain = f"{saved_as}, plain"
        found[saved_as] = fit(saved_as, save_to=saved_as)
        found[f"{saved_as}, resumed"] = fit(saved_as, seed=1, ckpt_path=saved_as)
        found[plain] = fit(saved_as, None, save_to=plain)
        found[f"{saved_as}, joined"] = fit(saved_as, seed=1, ckpt_path=plain)
        unordered = f"{saved_as}, unordered"
        found[unordered] = fit(saved_as, save_to=unordered, ordered=False)
        found[f"{unordered}, resumed"] = fit(saved_as, seed=1, ckpt_path=unordered, ordered=False)
    fit("full", None, save_to="full, unordered, plain", ordered=False)
    return found | {"refused": refusal("full, unordered, plain")}


def refusal(ckpt_path: str) -> str:
    try:
        fit("full", seed=1, ckpt_path=ckpt_path, ordered=False)
    except ValueError as error:
        return str(error)
    return "accepted"


def on_other_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Resume what another number of ranks saved."""
    return {saved_as: fit(saved_as, seed=1, ckpt_path=saved_as) for saved_as in FORMATS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return run_ranks_in(folder, every_case, WORLD)


@pytest.fixture(scope="module")
def other_ranks(ranks, folder) -> list[dict[str, Any]]:
    return run_ranks_in(folder, on_other_ranks, OTHER_WORLD)


@pytest.mark.parametrize("saved_as", FORMATS)
def test_each_optimizer_compresses_its_own_layers(ranks, saved_as):
    for rank in ranks:
        assert rank[saved_as]["classes"] == ["CompressedAdamW", "CompressedRMSprop"]
        end = rank[saved_as]["end"]
        assert {"net.words.weight.exp_avg_sq_row", "net.hidden.weight.exp_avg_sq_row"} <= end.keys()
        assert {"net.pairs.weight.square_avg_table", "net.pairs.weight.momentum_buffer_table"} <= end.keys()
        assert {"net.head.weight.square_avg", "net.hidden.bias.exp_avg"} <= end.keys(), "kept"
        assert "net.words.weight.square_avg_row" not in end


@pytest.mark.parametrize("saved_as", [*FORMATS, *(f"{saved_as}, unordered" for saved_as in FORMATS)])
def test_a_resumed_fit_is_the_undisturbed_one(ranks, saved_as):
    for rank in ranks:
        undisturbed, resumed = rank[saved_as], rank[f"{saved_as}, resumed"]
        assert_same(resumed["start"], undisturbed["saved"])
        assert resumed["losses"] == undisturbed["losses"][SAVED_AT:]
        assert len(resumed["losses"]) == STEPS - SAVED_AT
        assert_same(resumed["end"], undisturbed["end"])


@pytest.mark.parametrize("saved_as", FORMATS)
def test_a_plain_checkpoint_of_both_is_resumed_compressed(ranks, saved_as):
    for rank in ranks:
        then, joined = rank[f"{saved_as}, plain"]["saved"], rank[f"{saved_as}, joined"]
        assert rank[f"{saved_as}, plain"]["classes"] == ["AdamW", "RMSprop"]
        assert joined["classes"] == ["CompressedAdamW", "CompressedRMSprop"]
        now = joined["start"]
        for name in ("lrs", "net.head.weight.momentum_buffer", "net.hidden.bias.exp_avg_sq", "net.pairs.weight"):
            assert_same(now[name], then[name], name)
        means = now["net.words.weight.exp_avg_sq_row"] * now["net.words.weight.exp_avg_sq_scale"]
        torch.testing.assert_close(means, then["net.words.weight.exp_avg_sq"].mean(1))
        assert now["net.pairs.weight.square_avg_table"].any()


@pytest.mark.parametrize("saved_as", FORMATS)
def test_both_are_resumed_on_another_number_of_ranks(ranks, other_ranks, saved_as):
    then, now = [rank[saved_as]["saved"] for rank in ranks], [rank[saved_as]["start"] for rank in other_ranks]
    exact = ["net.words.weight", "net.words.weight.exp_avg", "net.pairs.weight", "net.hidden.bias.exp_avg_sq"]
    for name in [*exact, "net.head.weight.square_avg", "net.head.weight.momentum_buffer"]:
        assert_same(torch.cat([held[name] for held in now]), torch.cat([held[name] for held in then]), name)
    rows = "net.words.weight.exp_avg_sq"
    means = [torch.cat([held[f"{rows}_row"] * held[f"{rows}_scale"] for held in group]) for group in (now, then)]
    torch.testing.assert_close(*means)
    for rank, held in zip(other_ranks, now, strict=True):
        assert held["lrs"] == then[0]["lrs"]
        assert held["net.pairs.weight.step"] == held["net.words.weight.step"] == SAVED_AT
        assert held["net.pairs.weight.square_avg_table"].any()
        assert len(rank[saved_as]["losses"]) == STEPS - SAVED_AT


def test_a_full_checkpoint_that_cannot_tell_the_layers_apart_is_not_moved(ranks):
    for rank in ranks:
        assert "this checkpoint does not fit the compressed optimizer; nothing was changed" in rank["refused"]
        assert "where every parameter group has its parameters in the model's order" in rank["refused"]
