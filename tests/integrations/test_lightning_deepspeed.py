"""Lightning's DeepSpeedStrategy: the callback compresses, ZeRO-1, -2, -3 train and resume as one process does."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Policy, RowWise, Rule, compress, report
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from lightning_sketch.rules.inside import unwrap
from tests.deepspeed_tools import init_deepspeed
from tests.integrations.lightning_tools import DIM, ROWS, Tiny, batches, tiny, trainer
from tests.ranks import run_ranks_in

WORLD, OTHER_WORLD, ACCUMULATED, CLIP = 2, 3, 2, 0.05
BATCHES = 8  # of a rank in an epoch
POLICIES = {
    # what one process computes element by element, partitions compute
    "elementwise": Policy([Rule(name="table.weight", exp_avg=BFloat16(), exp_avg_sq=BFloat16())]),
    "Adagrad": Policy([Rule(name="table.weight", sum=BFloat16())]),
    "sketch": Policy([Rule(role="embedding", exp_avg=CountSketch(compression=2), exp_avg_sq=CountSketch())]),
    "shared": Policy(
        [Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=RowWise()), Rule(name="head.weight", exp_avg_sq=SM3())]
    ),
}


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy on CPUs, which it refuses though DeepSpeed itself runs there."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # without the check for CUDA

    def setup_distributed(self) -> None:
        # without the check of device indices, which CPUs do not have
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        import deepspeed

        engine, wrapper, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),  # the strategy's is the index of a CUDA device
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapper


class Late(Tiny):
    """Makes its layers where Lightning asks for it, under ZeRO-3 inside ``deepspeed.zero.Init``: none is ever whole."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(ROWS, DIM), nn.Linear(DIM, 5)


@dataclass(frozen=True)
class Case:
    """One training."""

    stage: int
    policy: str
    precision: str = "32-true"
    special: str = ""

    def __str__(self) -> str:
        return f"ZeRO-{self.stage} {self.policy} {self.precision} {self.special}".rstrip()


CASES = (
    *(Case(stage, policy) for stage in (1, 2, 3) for policy in ("elementwise", "shared")),
    *(Case(stage, "sketch", "bf16-mixed") for stage in (1, 2, 3)),
    Case(2, "Adagrad"),
    Case(2, "elementwise", special="offload"),
    Case(3, "elementwise", special="configure_model"),
    Case(3, "shared", special="without callback"),
)
#: Those that another number of ranks trains, too.
ON_OTHER_RANKS = (Case(1, "elementwise"), Case(2, "shared"), Case(3, "elementwise"))
#: With the number of ranks.
EVERY_CASE = (*((WORLD, case) for case in CASES), *((OTHER_WORLD, case) for case in ON_OTHER_RANKS))


def configure(policy: str) -> Any:
    def configure_optimizers(module: Any) -> Any:
        cls = torch.optim.Adagrad if policy == "Adagrad" else torch.optim.AdamW
        groups = [
            {"params": [module.table.weight, module.head.bias], "weight_decay": 0.0},
            {"params": [module.head.weight], "lr": 1e-2},
        ]
        optimizer = cls(groups, lr=2e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return configure_optimizers


def one_process(policy: str, world: int) -> list[float]:
    """Losses of rank 0's batches in training on those of all ranks, without DeepSpeed or Lightning."""
    module = tiny(configure(policy))
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    compress(optimizer, module, POLICIES[policy])
    losses = []
    for i, (tokens, target) in enumerate([*batches(world * BATCHES)] * 2):
        loss = nn.functional.cross_entropy(module.head(module.table(tokens).mean(1)), target)
        (loss / (world * ACCUMULATED)).backward()
        losses += [loss.item()] if i % world == 0 else []
        if (i + 1) % (world * ACCUMULATED) == 0:
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return losses


def make(case: Case) -> Any:
    """The module to train."""
    make_optimizer = configure(case.policy)

    def compressed(module: Any) -> Any:
        configured = make_optimizer(module)
        compress(configured["optimizer"], module, POLICIES[case.policy])
        return configured

    if case.special == "configure_model":
        return Late(make_optimizer)
    return tiny(compressed if case.special == "without callback" else make_optimizer)


def fit(rank: int, case: Case, ckpt_path: str | None = None, **config: Any) -> dict[str, Any]:
    """Train two epochs, or the rest of them from a checkpoint; `config` goes into DeepSpeed's configuration."""
    world = torch.distributed.get_world_size()
    module = make(case)
    if ckpt_path:
        nn.init.zeros_(module.table.weight)  # what is loaded must replace
    strategy = CPUDeepSpeedStrategy(
        stage=case.stage,
        process_group_backend="gloo",
        offload_optimizer=case.special == "offload",
        logging_batch_size_per_gpu=4,
        reduce_bucket_size=2000,
        allgather_bucket_size=2000,
    )
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else this model stays whole
    strategy.config |= {"zero_force_ds_cpu_optimizer": False} | config
    callbacks = [ModelCheckpoint(f"{case}", "{epoch}", save_top_k=-1)]
    if case.special not in ("plain", "without callback"):
        callbacks.append(OptimizerStateCompression(POLICIES[case.policy]))
    made = trainer(
        devices=world,
        strategy=strategy,
        precision=case.precision,
        enable_checkpointing=True,
        callbacks=callbacks,
        max_epochs=2,
        use_distributed_sampler=False,  # which shuffles
        gradient_clip_val=CLIP,
        accumulate_grad_batches=ACCUMULATED,
    )
    own = DataLoader([*batches(world * BATCHES)][rank::world], batch_size=None)
    made.fit(module, own, ckpt_path=ckpt_path)
    client, memory = unwrap(made.optimizers[0]), report(made.optimizers[0])
    tensors = [p for group in client.param_groups for p in group["params"]]
    end = {"states": [dict(client.state[p]) for p in tensors], "tensors": tensors}
    return {
        "world": made.world_size,
        "client": type(client).__qualname__,
        "losses": module.losses,
        "lrs": module.lrs,
        "end": tree_map_only(Tensor, lambda t: t.detach().clone(), end),
        "state": memory.state,
        "dense_state": memory.dense_state,
    }


def error(rank: int, case: Case, *args: Any, **config: Any) -> str:
    """What `fit` raises."""
    try:
        fit(rank, case, *args, **config)
    except Exception as raised:  # ours, or DeepSpeed's own
        return f"{type(raised).__name__}: {raised}"
    return "no error"


def on_any_number(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    os.environ["NODE_RANK"] = "0"  # as torchrun sets it: Lightning then starts no processes of its own
    found: dict[str, Any] = {}
    for case in [case for world, case in EVERY_CASE if world == world_size]:
        found[f"{case}"] = {"whole": fit(rank, case), "resumed": fit(rank, case, f"{case}/epoch=0.ckpt")}
    return found


def all_cases(rank: int, world_size: int) -> dict[str, Any]:
    found = on_any_number(rank, world_size)
    for stage in (1, 2, 3):
        plain, case = Case(stage, "elementwise", special="plain"), Case(stage, "elementwise")
        found[f"{plain}"] = {"whole": fit(rank, plain), "resumed": fit(rank, case, f"{plain}/epoch=0.ckpt")}
    # last, because Lightning does not clean up
    found["other policy"] = error(rank, Case(2, "shared"), f"{Case(2, 'elementwise')}/epoch=0.ckpt")
    found["offload"] = error(rank, Case(2, "elementwise", special="offload"), zero_force_ds_cpu_optimizer=True)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks_in(tmp_path_factory.mktemp("ranks"), all_cases, WORLD)


@pytest.fixture(scope="module")
def other_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks_in(tmp_path_factory.mktemp("ranks"), on_any_number, OTHER_WORLD)


@pytest.fixture
def any_ranks(request, world) -> list[dict[str, Any]]:
    return request.getfixturevalue("ranks" if world == WORLD else "other_ranks")


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("world", "case"), EVERY_CASE, ids=str)
def test_our_optimizer_trains_on_all_ranks(any_ranks, world, case):
    every = [rank[f"{case}"]["whole"] for rank in any_ranks]
    for found in every:
        assert found["world"] == world
        assert found["client"] == ("CompressedAdagrad" if case.policy == "Adagrad" else "CompressedAdamW")
        assert len(found["losses"]) == 2 * BATCHES
        assert found["lrs"][-1] == [2e-2 / 2**4, 1e-2 / 2**4]
        first, second = found["losses"][:BATCHES], found["losses"][BATCHES:]
        assert sum(second) < sum(first), "the same batches"
        assert found["state"] < 0.6 * found["dense_state"]
    assert every[0]["losses"] != every[1]["losses"], "every rank has its own batches"


@pytest.mark.parametrize(("world", "case"), [each for each in EVERY_CASE if each[1].precision == "32-true"], ids=str)
def test_it_is_the_training_of_one_process(any_ranks, world, case):
    # Row means of cut rows are per rank; the sums of gradients differ in rounding.
    close = 0.05 if case.policy == "shared" else 1e-4
    found = torch.tensor(any_ranks[0][f"{case}"]["whole"]["losses"])
    torch.testing.assert_close(found, torch.tensor(one_process(case.policy, world)), rtol=0, atol=close)


@pytest.mark.parametrize(("world", "case"), EVERY_CASE, ids=str)
def test_ckpt_path_resumes_exactly(any_ranks, case):
    for rank in any_ranks:
        whole, resumed = rank[f"{case}"]["whole"], rank[f"{case}"]["resumed"]
        assert len(resumed["losses"]) == BATCHES
        assert resumed["losses"] == whole["losses"][-BATCHES:]
        assert resumed["lrs"] == whole["lrs"][-BATCHES:]
        torch.testing.assert_close(resumed["end"], whole["end"], rtol=0, atol=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_plain_checkpoint_resumes_compressed(ranks, stage):
    for rank in ranks:
        plain, resumed = rank[f"ZeRO-{stage} elementwise 32-true plain"].values()
        assert (plain["client"], resumed["client"]) == ("AdamW", "CompressedAdamW")
        after = plain["losses"][BATCHES:]
        assert resumed["losses"][:ACCUMULATED] == after[:ACCUMULATED], "the same weights"
        assert resumed["losses"] != after
        # bfloat16 states
        torch.testing.assert_close(torch.tensor(resumed["losses"]), torch.tensor(after), rtol=0, atol=0.01)


def test_a_checkpoint_of_another_policy_is_refused(ranks):
    for rank in ranks:
        assert rank["other policy"].startswith("ValueError: this checkpoint does not fit the compressed optimizer")


def test_the_error_names_the_setting_that_offload_needs(ranks):
    for rank in ranks:
        assert '"zero_force_ds_cpu_optimizer"' in rank["offload"]
