"""Accelerate's FSDP2: converted before ``prepare``, which replaces every parameter; both kinds of ``save_state``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn import functional as F

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Keep, Policy, RowWise, Rule, compress, report
from lightning_sketch.integrations.accelerate import load_state
from tests.ranks import run_ranks_in
from tests.tiny import assert_same

WORLD, OTHER_WORLD = 2, 3
ROWS, DIM = 51, 6  # 26 and 25 rows
MICRO_BATCHES, SAVED_AT = 20, 12
KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
POLICY = Policy(
    [
        Rule(name="tables.0.weight", exp_avg=CountSketch(compression=3), exp_avg_sq=CountSketch(compression=3)),
        Rule(name="tables.1.weight", exp_avg=Drop(), exp_avg_sq=RowWise()),
        Rule(name="tables.2.weight", exp_avg=BFloat16(), exp_avg_sq=RowWise(compression=4)),
        Rule(name="tables.3.weight", exp_avg=Keep(), exp_avg_sq=SM3()),
        Rule(name="kind.weight", exp_avg=BFloat16(), exp_avg_sq=RowWise()),
        Rule(name="hidden.weight", exp_avg=BFloat16(), exp_avg_sq=Factored()),
    ]
)
SAME_AS_ONE = Policy([Rule(name="tables.*", exp_avg=Drop(), exp_avg_sq=RowWise())])


class Words(nn.Module):
    """Four tables, one of a single row (nothing is left for rank 1), and a head of 17 rows (9 and 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, DIM) for _ in range(4))
        self.hidden = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 17)
        self.kind = nn.Embedding(1, DIM)

    def forward(self, words: Tensor) -> Tensor:
        features = sum((table(words) for table in self.tables), self.kind(torch.zeros_like(words)))
        return F.cross_entropy(self.head(self.hidden(features).tanh()), words % 17)


def words(step: int, rank: int) -> Tensor:
    """Word ids ``[8]``, mostly small ones; every rank has its own."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (torch.rand(8, generator=generator) ** 2 * ROWS).long()


def make(policy: Policy | None, seed: int = 0) -> tuple[Words, Any]:
    """The model, and an optimizer of two groups, each of compressed and kept layers."""
    torch.manual_seed(seed)
    model = Words()
    groups = [{"params": [*model.tables.parameters(), *model.head.parameters()], "weight_decay": 0.1}]
    groups += [{"params": [*model.hidden.parameters(), *model.kind.parameters()], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    return model, optimizer if policy is None else compress(optimizer, model, policy)


@dataclass
class Run:
    """What ``prepare`` returned, on this rank."""

    accelerator: Any
    model: nn.Module
    optimizer: Any
    scheduler: Any

    def train(self, micro_batches: Iterable[int]) -> list[float]:
        losses = []
        for number in micro_batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(words(number, self.accelerator.process_index))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def shards(self) -> dict[str, Any]:
        """What this rank holds: copies of its parts of all parameters, and of their states."""
        held: dict[str, Any] = {"lr": self.optimizer.param_groups[0]["lr"]}
        for name, param in self.model.named_parameters():
            held[name] = param.to_local().detach().clone()
            for key, value in self.optimizer.optimizer.state[param].items():
                local = value.to_local() if hasattr(value, "to_local") else value
                held[f"{name}.{key}"] = local.clone() if isinstance(local, Tensor) else local
        return held


def start(policy: Policy | None, kind: str = KINDS[0], seed: int = 0, **plugin_options: Any) -> Run:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate keeps its state in the classes
    GradientState._reset_state()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", OMP_NUM_THREADS="1")
    os.environ.update(WORLD_SIZE=f"{world}", LOCAL_WORLD_SIZE=f"{world}")
    options = {"cpu_ram_efficient_loading": False} | plugin_options
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, **options)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    # Accelerate turns FSDP on where there are GPUs or the like; this is what it does there, and all it does.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    model, optimizer = make(policy, seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, world, gamma=0.9)  # Accelerate steps it `world` times
    return Run(accelerator, *accelerator.prepare(model, optimizer, scheduler))


def refusal(run: Run, path: str) -> str:
    try:
        load_state(run.accelerator, path)
    except ValueError as error:
        return str(error)
    return "accepted"


def saved_by(world_size: int, kind: str) -> str:
    return f"{kind} of {world_size}"


def undisturbed_and_resumed(kind: str, path: str) -> dict[str, Any]:
    run = start(POLICY, kind)
    found: dict[str, Any] = {"first losses": run.train(range(SAVED_AT)), "saved": run.shards()}
    run.accelerator.save_state(path)
    found |= {"losses": run.train(range(SAVED_AT, MICRO_BATCHES)), "end": run.shards()}
    run = start(POLICY, kind, seed=1)
    run.accelerator.load_state(path)
    return found | {"resumed": run.train(range(SAVED_AT, MICRO_BATCHES)), "resumed end": run.shards()}


def refused(kind: str, path: str) -> dict[str, str]:
    return {
        "other seed": refusal(start(Policy(POLICY.rules, seed=1), kind), path),
        "other policy": refusal(start(SAME_AS_ONE, kind), path),
    }


def from_plain(kind: str) -> dict[str, Any]:
    run = start(None, kind)
    run.train(range(SAVED_AT))
    run.accelerator.save_state(f"{kind}-plain")
    found: dict[str, Any] = {"plain": run.shards()}
    run = start(POLICY, kind, seed=1)
    load_state(run.accelerator, f"{kind}-plain")
    found |= {"loaded": run.shards(), "losses": run.train(range(SAVED_AT, MICRO_BATCHES))}
    return found | {"errors": {fqn: dict(errors) for fqn, errors in report(run.optimizer).conversion_errors.items()}}


def prepared_both_ways() -> dict[str, Any]:
    """Converted before and after ``prepare``; with the model sharded on the meta device, and offloaded."""
    found: dict[str, Any] = {}
    for when, run in (
        ("before", start(POLICY)),
        ("after", start(None)),
        ("meta", start(POLICY, cpu_ram_efficient_loading=True)),
        ("offloaded", start(POLICY, cpu_offload=CPUOffloadPolicy(pin_memory=False))),
    ):
        if when == "after":
            compress(run.optimizer, run.model, POLICY)
        by_name = dict(run.model.named_parameters())
        layers = [(layer.fqn, param) for _, layer, param in run.optimizer.optimizer.compressed_layers()]
        found[when] = {
            "layers": [fqn for fqn, _ in layers],
            "own": all(by_name[fqn] is param for fqn, param in layers),
            "types": sorted({type(p).__name__ for group in run.optimizer.param_groups for p in group["params"]}),
            "losses": run.train(range(6)),
            "end": run.shards(),
            "bytes": report(run.optimizer).state,
        }
    return found


def on_any_number(world_size: int) -> dict[str, Any]:
    same = start(SAME_AS_ONE)
    found: dict[str, Any] = {"same as one": same.train(range(MICRO_BATCHES)), "same as one, end": same.shards()}
    return found | {kind: undisturbed_and_resumed(kind, saved_by(world_size, kind)) for kind in KINDS}


def every_case(rank: int, world_size: int) -> dict[str, Any]:
    found = on_any_number(world_size) | {"prepared": prepared_both_ways()}
    for kind in KINDS:
        found[f"{kind}, refused"] = refused(kind, saved_by(world_size, kind))
        found[f"{kind}, plain"] = from_plain(kind)
    return found


def on_other_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Train, and resume what another number of ranks saved."""
    found = on_any_number(world_size)
    for kind in KINDS:
        run = start(POLICY, kind, seed=1)
        load_state(run.accelerator, saved_by(WORLD, kind))
        found[f"{kind}, moved"] = {"loaded": run.shards(), "losses": run.train(range(SAVED_AT, MICRO_BATCHES))}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return run_ranks_in(folder, every_case, WORLD)


@pytest.fixture(scope="module")
def other_ranks(ranks, folder) -> list[dict[str, Any]]:
    return run_ranks_in(folder, on_other_ranks, OTHER_WORLD)


@pytest.fixture(params=[WORLD, OTHER_WORLD])
def any_ranks(request) -> list[dict[str, Any]]:
    return request.getfixturevalue("ranks" if request.param == WORLD else "other_ranks")


@pytest.mark.distributed
def test_sharded_training_is_that_of_one_process(any_ranks):
    model, optimizer = make(SAME_AS_ONE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    world = len(any_ranks)
    losses: list[list[float]] = [[] for _ in range(world)]
    for number in range(MICRO_BATCHES):
        for rank in range(world):
            loss = model(words(number, rank))
            (loss / world / 2).backward()
            losses[rank].append(loss.item())
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    for rank, alone in zip(any_ranks, losses, strict=True):
        # Of float32 numbers: gradients' means and their norm are sums in another order.
        torch.testing.assert_close(torch.tensor(rank["same as one"]), torch.tensor(alone))
        assert rank["same as one, end"]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
    for name, param in model.named_parameters():
        joined = torch.cat([rank["same as one, end"][name] for rank in any_ranks])
        torch.testing.assert_close(joined, param.detach(), msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("when", ["before", "after", "meta", "offloaded"])
def test_the_prepared_optimizer_holds_dtensors_and_its_policy_by_position(ranks, when):
    compressed = [*(f"tables.{i}.weight" for i in range(4)), "hidden.weight", "kind.weight"]
    for rank in ranks:
        prepared = rank["prepared"][when]
        assert (prepared["layers"], prepared["own"], prepared["types"]) == (compressed, True, ["DTensor"])
        assert prepared["losses"] == rank["prepared"]["before"]["losses"]
        assert_same(prepared["end"], rank["prepared"]["before"]["end"])
    tables = [rank["prepared"][when]["end"]["tables.2.weight.exp_avg"] for rank in ranks]
    assert [(tuple(x.shape), x.dtype) for x in tables] == [((26, 6), torch.bfloat16), ((25, 6), torch.bfloat16)]
    assert [len(rank["prepared"][when]["end"]["kind.weight"]) for rank in ranks] == [1, 0], "an empty shard"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_undisturbed_one(any_ranks, kind):
    for rank in any_ranks:
        assert rank[kind]["resumed"] == rank[kind]["losses"]
        assert_same(rank[kind]["resumed end"], rank[kind]["end"])
        assert rank[kind]["end"]["tables.0.weight.step"] == MICRO_BATCHES / 2, "two micro-batches make a step"
    assert any_ranks[0][kind]["losses"] != any_ranks[1][kind]["losses"]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_policy_is_refused_on_all_ranks(ranks, kind):
    for rank in ranks:
        assert "tables.1.weight: its hash seed in the checkpoint" in rank[f"{kind}, refused"]["other seed"]
        assert "tables.0.weight: its codecs in the checkpoint" in rank[f"{kind}, refused"]["other policy"]
        assert (
            "hidden.weight: compressed in the checkpoint, kept by the policy"
            in rank[f"{kind}, refused"]["other policy"]
        )


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_checkpoint_is_loaded_compressed(ranks, kind):
    table = "tables.1.weight.exp_avg_sq"
    for rank in ranks:
        then, now = rank[f"{kind}, plain"]["plain"], rank[f"{kind}, plain"]["loaded"]
        for name in ("tables.0.weight", "tables.3.weight.exp_avg", "head.weight.exp_avg_sq", "lr"):
            assert_same(now[name], then[name], name)
        torch.testing.assert_close(now[f"{table}_row"] * now[f"{table}_scale"], then[table].mean(1))
        assert 0 < rank[f"{kind}, plain"]["errors"]["tables.2.weight"]["exp_avg"] < 0.01
        assert len(rank[f"{kind}, plain"]["losses"]) == MICRO_BATCHES - SAVED_AT


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_loaded_on_another_number_of_ranks(ranks, other_ranks, kind):
    then, now = [rank[kind]["saved"] for rank in ranks], [rank[f"{kind}, moved"]["loaded"] for rank in other_ranks]
    for name in ("tables.0.weight", "tables.2.weight.exp_avg", "head.weight.exp_avg_sq", "kind.weight.exp_avg"):
        assert_same(torch.cat([x[name] for x in now]), torch.cat([x[name] for x in then]), name)
    table = "tables.1.weight.exp_avg_sq"
    means = [torch.cat([x[f"{table}_row"] * x[f"{table}_scale"] for x in held]) for held in (now, then)]
    torch.testing.assert_close(*means)
    assert all(x["tables.0.weight.step"] == SAVED_AT / 2 and x["lr"] == then[0]["lr"] for x in now)
    assert all(x["tables.0.weight.exp_avg_table"].any() for x in now)
