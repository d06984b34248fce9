"""FSDP2 under Lightning's ModelParallelStrategy: shards by rows and columns, both checkpoint formats, and the traps."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils.data import DataLoader

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Keep, Policy, RowWise, Rule, compress, report
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from tests.integrations.lightning_tools import trainer
from tests.ranks import run_ranks_in
from tests.tiny import assert_same

WORLD, OTHER_WORLD = 2, 3
ROWS, DIM = 51, 6  # 26 and 25 rows
STEPS, SAVED_AT = 10, 6
TABLE, TABLE_1 = (ROWS, DIM), "net.tables.1.weight.exp_avg_sq"
POLICY = Policy(
    [
        Rule(name="net.tables.0.weight", first_moment=CountSketch(3), second_moment=CountSketch(3)),
        Rule(name="net.tables.1.weight", first_moment=Drop(), second_moment=RowWise()),
        Rule(name="net.tables.2.weight", first_moment=BFloat16(), second_moment=RowWise(compression=4)),
        Rule(name="net.tables.3.weight", first_moment=Keep(), second_moment=SM3()),
        Rule(name="net.kind.weight", first_moment=BFloat16(), second_moment=RowWise()),
        Rule(name="net.hidden.weight", first_moment=BFloat16(), second_moment=Factored()),
    ]
)
#: What is equal to one process: row scalars where rows are whole, a count-sketch where ranks hold columns.
SAME_AS_ONE = {
    "rows": Policy([Rule(min_rows=ROWS, name="net.tables.*", first_moment=Drop(), second_moment=RowWise())]),
    "columns": Policy([Rule(name="net.tables.*", first_moment=CountSketch(3), second_moment=CountSketch(3))]),
}
PLACEMENTS, FORMATS = ("rows", "columns"), ("distributed", "full")
CASES = {
    WORLD: [(placement, saved_as) for placement in PLACEMENTS for saved_as in FORMATS],
    OTHER_WORLD: [("rows", "distributed"), ("columns", "full")],
}


class Net(nn.Module):
    """Four tables, one of a single row (nothing is left for rank 1), and a head of 17 rows (9 and 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, DIM) for _ in range(4))
        self.kind = nn.Embedding(1, DIM)
        self.hidden = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 17)

    def forward(self, words: Tensor) -> Tensor:
        features = sum((table(words) for table in self.tables), self.kind(torch.zeros_like(words)))
        return nn.functional.cross_entropy(self.head(self.hidden(features).tanh()), words % 17)


def words(step: int, rank: int) -> Tensor:
    """Word ids ``[8]``, mostly small ones; every rank has its own."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (torch.rand(8, generator=generator) ** 2 * ROWS).long()


class Words(LightningModule):
    """Draws its own batches, by step: Lightning would begin the epoch again when it resumes in the middle."""

    def __init__(self, placement: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = Net()
        self.placement = placement
        self.losses: list[float] = []
        self.events: list[str] = []

    def configure_model(self) -> None:
        by_columns = self.placement == "columns"
        place = (lambda p: Shard(1) if p.shape == TABLE else Shard(0)) if by_columns else None
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"], shard_placement_fn=place)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.net(words(self.global_step, self.global_rank))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.net(words(0, self.global_rank))  # FSDP2 leaves gathered parameters behind

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        optimizer.register_load_state_dict_pre_hook(lambda o, _: self.events.append(f"load {type(o).__qualname__}"))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Watch(Callback):
    """Save at step `SAVED_AT`; note when what happens, and the states that are saved and that training starts from."""

    def __init__(self, save_to: str | None) -> None:
        self.save_to = save_to
        self.start: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def on_fit_start(self, trainer, pl_module):
        pl_module.events.append("on_fit_start")

    def on_train_start(self, trainer, pl_module):
        self.start = shards(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.save_to and trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.save_to)
            self.saved = shards(trainer, pl_module)


def shards(made: Any, module: Any) -> dict[str, Any]:
    """What this rank holds: copies of its parts of all parameters, and of their states."""
    module.net.reshard()  # validation may have left the gathered parameters in their place
    held: dict[str, Any] = {"lr": made.optimizers[0].param_groups[0]["lr"]}
    for name, param in module.named_parameters():
        held[name] = param.to_local().detach().clone()
        for key, value in made.optimizers[0].state[param].items():
            local = value.to_local() if hasattr(value, "to_local") else value
            held[f"{name}.{key}"] = local.clone() if isinstance(local, Tensor) else local
    return held


def fit(
    policy: Policy | None,
    placement: str = "rows",
    *,
    save_to: str | None = None,
    saved_as: str = "full",
    ckpt_path: str | None = None,
    steps: int = STEPS,
    seed: int = 0,
    log_memory: bool = False,
    **sizes: Any,
) -> dict[str, Any]:
    # The variables that torchrun sets: Lightning then starts no processes of its own. It deletes some of them.
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    module, watch = Words(placement, seed), Watch(save_to)
    callbacks = [OptimizerStateCompression(policy, log_memory=log_memory)] if policy else []
    made = trainer(
        devices=world,
        strategy=ModelParallelStrategy(
            **(sizes or {"data_parallel_size": world, "tensor_parallel_size": 1}),
            save_distributed_checkpoint=saved_as == "distributed",
        ),
        callbacks=[*callbacks, watch],
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=0.5,
    )
    made.fit(module, DataLoader(range(4), batch_size=None), DataLoader(range(1), batch_size=None), ckpt_path=ckpt_path)
    end = shards(made, module)
    weights = {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}
    return {
        "losses": module.losses,
        "events": module.events,
        "start": watch.start,
        "saved": watch.saved,
        "end": end,
        "weights": weights,
        "bytes": report(made.optimizers[0]).state,
        "errors": {k: dict(v) for k, v in report(made.optimizers[0]).conversion_errors.items()},
        "class": type(made.optimizers[0]).__qualname__,
    }


def refusal(*args: Any, **kwargs: Any) -> str:
    try:
        fit(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "accepted"


def listen(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What Lightning prints and warns of meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    rank_zero.log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = function(*args, **kwargs)
    finally:
        rank_zero.log.removeHandler(handler)
    return result | {"messages": messages, "warnings": [str(warning.message) for warning in caught]}


def saved_by(world_size: int, case: str) -> str:
    return f"{case} of {world_size}"


def on_any_number(world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for placement in PLACEMENTS:
        found[f"same as one, {placement}"] = fit(SAME_AS_ONE[placement], placement)
    for placement, saved_as in CASES[world_size]:
        case = f"{placement}-{saved_as}"
        path = saved_by(world_size, case)
        found[case] = fit(POLICY, placement, save_to=path, saved_as=saved_as)
        found[f"{case}, resumed"] = fit(POLICY, placement, ckpt_path=path, saved_as=saved_as, seed=1)
    return found


def every_case(rank: int, world_size: int) -> dict[str, Any]:
    found = on_any_number(world_size)
    for placement in PLACEMENTS:
        for saved_as in FORMATS:
            case, dense = f"{placement}-{saved_as}", f"{placement}-{saved_as}-dense"
            path = saved_by(world_size, case)
            found[dense] = fit(None, placement, save_to=dense, saved_as=saved_as, steps=SAVED_AT)
            found[f"{dense}, resumed"] = fit(POLICY, placement, ckpt_path=dense, saved_as=saved_as, seed=1)
            reseeded = Policy(POLICY.rules, seed=1)
            found[f"{case}, other seed"] = refusal(reseeded, placement, ckpt_path=path, saved_as=saved_as)
            other = Policy([Rule(min_rows=ROWS, first_moment=BFloat16(), second_moment=RowWise())])
            found[f"{case}, other policy"] = refusal(other, placement, ckpt_path=path, saved_as=saved_as)
    found["printed"] = listen(fit, POLICY, steps=1, log_memory=True)
    found["Lightning's default"] = listen(fit, POLICY, steps=1, data_parallel_size="auto")
    found["data_parallel_size=1"] = listen(fit, POLICY, steps=1, data_parallel_size=1, log_memory=True)
    return found


def on_other_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Train, and resume what another number of ranks saved."""
    found = on_any_number(world_size)
    for placement, saved_as in CASES[WORLD]:
        path = saved_by(WORLD, f"{placement}-{saved_as}")
        found[f"{placement}-{saved_as}, moved"] = fit(POLICY, placement, ckpt_path=path, saved_as=saved_as, seed=1)
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


@pytest.fixture
def any_ranks(request, world) -> list[dict[str, Any]]:
    return request.getfixturevalue("ranks" if world == WORLD else "other_ranks")


def train_alone(policy: Policy, world: int) -> tuple[dict[str, Tensor], list[list[float]]]:
    """One process that sees every rank's batches: weights, and losses by rank."""
    torch.manual_seed(0)
    holder = nn.Module()  # names as in `Words`
    holder.net = net = Net()
    optimizer = compress(torch.optim.AdamW(holder.parameters(), lr=0.02), holder, policy)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    losses: list[list[float]] = [[] for _ in range(world)]
    for step in range(STEPS):
        per_rank = [net(words(step, rank)) for rank in range(world)]
        optimizer.zero_grad()
        (sum(per_rank) / world).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        for kept, loss in zip(losses, per_rank, strict=True):
            kept.append(loss.item())
    return {name: p.detach() for name, p in holder.named_parameters()}, losses


@pytest.mark.distributed
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("world", CASES)
def test_sharded_training_is_that_of_one_process(any_ranks, world, placement):
    weights, losses = train_alone(SAME_AS_ONE[placement], world)
    for rank, alone in zip(any_ranks, losses, strict=True):
        # Losses are float32: one of its last bits may differ, as gradients are summed over ranks.
        assert rank[f"same as one, {placement}"]["losses"] == pytest.approx(alone, rel=1e-6)
    torch.testing.assert_close(any_ranks[0][f"same as one, {placement}"]["weights"], weights)


@pytest.mark.distributed
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_rank_holds_its_part_of_the_states(ranks, placement):
    ends = [rank[f"{placement}-full"]["end"] for rank in ranks]
    tables = [tuple(end["net.tables.1.weight"].shape) for end in ends]
    assert tables == ([(26, 6), (25, 6)] if placement == "rows" else [(51, 3), (51, 3)])
    bfloat16 = [end["net.tables.2.weight.exp_avg"] for end in ends]
    assert [(tuple(x.shape), x.dtype) for x in bfloat16] == [(shape, torch.bfloat16) for shape in tables]
    assert [len(end["net.kind.weight"]) for end in ends] == [1, 0], "an empty shard"
    assert [end["net.kind.weight.step"].item() for end in ends] == [STEPS, STEPS]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "placement", "saved_as"), [(world, *case) for world in CASES for case in CASES[world]]
)
def test_a_resumed_fit_is_the_undisturbed_one(any_ranks, placement, saved_as):
    case = f"{placement}-{saved_as}"
    for rank in any_ranks:
        undisturbed, resumed = rank[case], rank[f"{case}, resumed"]
        assert resumed["losses"] == undisturbed["losses"][SAVED_AT:]
        assert_same(resumed["end"], undisturbed["end"])
    assert any_ranks[0][case]["losses"] != any_ranks[1][case]["losses"]


@pytest.mark.distributed
@pytest.mark.parametrize("saved_as", FORMATS)
def test_the_optimizer_is_checked_before_it_is_restored_and_restored_converted(ranks, saved_as):
    for rank in ranks:
        assert rank[f"rows-{saved_as}, resumed"]["events"] == ["on_fit_start", "load CompressedAdamW"]


@pytest.mark.distributed
@pytest.mark.parametrize("saved_as", FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_dense_checkpoint_resumes_compressed(ranks, placement, saved_as):
    for rank in ranks:
        dense, resumed = (rank[f"{placement}-{saved_as}-dense{part}"] for part in ("", ", resumed"))
        assert (dense["class"], resumed["class"]) == ("AdamW", "CompressedAdamW")
        then, now = dense["end"], resumed["start"]
        for name in ("net.tables.3.weight.exp_avg", "net.head.weight.exp_avg_sq", "net.tables.1.weight.step", "lr"):
            assert_same(now[name], then[name], name)
        torch.testing.assert_close(now[f"{TABLE_1}_row"] * now[f"{TABLE_1}_scale"], then[TABLE_1].mean(1))
        assert 0 < resumed["errors"]["net.tables.2.weight"]["exp_avg"] < 0.01
        assert len(resumed["losses"]) == STEPS - SAVED_AT


@pytest.mark.distributed
@pytest.mark.parametrize("saved_as", FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_checkpoint_of_another_policy_is_refused_on_all_ranks(ranks, placement, saved_as):
    for rank in ranks:
        assert "net.tables.1.weight: its hash seed in the checkpoint" in rank[f"{placement}-{saved_as}, other seed"]
        assert "net.tables.1.weight: its codecs in the checkpoint" in rank[f"{placement}-{saved_as}, other policy"]


@pytest.mark.distributed
@pytest.mark.parametrize("saved_as", FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_checkpoint_resumes_on_another_number_of_ranks(ranks, other_ranks, placement, saved_as):
    then = [rank[f"{placement}-{saved_as}"]["saved"] for rank in ranks]
    now = [rank[f"{placement}-{saved_as}, moved"]["start"] for rank in other_ranks]
    columns = int(placement == "columns")
    joined = {"net.tables.2.weight": columns, "net.tables.2.weight.exp_avg": columns, "net.head.weight.exp_avg_sq": 0}
    joined |= {"net.kind.weight.exp_avg": 0, "net.head.bias": 0, "net.tables.3.weight.exp_avg": columns}
    for name, dim in joined.items():
        assert_same(torch.cat([x[name] for x in now], dim), torch.cat([x[name] for x in then], dim), name)
    if placement == "rows":
        means = [[x[f"{TABLE_1}_row"] * x[f"{TABLE_1}_scale"] for x in held] for held in (now, then)]
        torch.testing.assert_close(torch.cat(means[0]), torch.cat(means[1]))
    assert all(x["net.tables.0.weight.step"] == SAVED_AT and x["lr"] == then[0]["lr"] for x in now)
    assert all(x["net.tables.0.weight.exp_avg_table"].any() for x in now)
    assert all(len(rank[f"{placement}-{saved_as}, moved"]["losses"]) == STEPS - SAVED_AT for rank in other_ranks)


@pytest.mark.distributed
def test_the_line_of_bytes_says_that_they_are_those_of_one_rank(ranks):
    first, second = (rank["printed"] for rank in ranks)
    lines = [message for message in first["messages"] if " instead of " in message]
    assert len(lines) == 1
    assert lines[0].startswith(f"optimizer state on this rank: {first['bytes'] / 1024:.2f} KiB instead of ")
    assert not any("optimizer state" in message for message in second["messages"]), "rank zero speaks"
    assert not any("data_parallel_size" in message for message in first["warnings"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["Lightning's default", "data_parallel_size=1"])
def test_a_strategy_that_shards_nothing_is_warned_of(ranks, case):
    for rank, heard in enumerate(ranks):
        warned = [message for message in heard[case]["warnings"] if "data_parallel_size=1" in message]
        assert len(warned) == (rank == 0)
        assert all("Pass ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in w for w in warned)
        assert heard[case]["bytes"] > 1.8 * heard["printed"]["bytes"]
    lines = [m for m in ranks[0]["data_parallel_size=1"]["messages"] if " instead of " in m]
    assert len(lines) == 1
    assert lines[0].startswith("optimizer state: "), "all of it is on this rank"
