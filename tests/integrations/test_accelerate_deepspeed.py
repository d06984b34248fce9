"""Accelerate's DeepSpeed plugin: compress before ``prepare``; ZeRO-1, -2, -3 train and resume as one process does."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils._pytree import tree_map_only

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Policy, RowWise, Rule, compress, report
from lightning_sketch.integrations.deepspeed import attach
from lightning_sketch.rules.inside import unwrap
from tests.deepspeed_tools import config, init_deepspeed
from tests.ranks import run_ranks_in

ROWS, DIM, WORLD, OTHER_WORLD = 50, 6, 2, 3
STEPS, SAVED_AT, ACCUMULATED, CLIP = 16, 12, 2, 0.05
POLICIES = {
    # what one process computes element by element, partitions compute
    "elementwise": Policy(
        [
            Rule(name="first.weight", exp_avg=BFloat16(), exp_avg_sq=BFloat16()),
            Rule(name="second.weight", exp_avg=Drop()),
        ]
    ),
    "Adagrad": Policy([Rule(role="embedding", sum=BFloat16())]),
    "shared": Policy(
        [
            Rule(name="first.weight", exp_avg=CountSketch(compression=4), exp_avg_sq=CountSketch(compression=4)),
            Rule(name="second.weight", exp_avg=Drop(), exp_avg_sq=RowWise()),
            Rule(name="head.weight", exp_avg=BFloat16(), exp_avg_sq=SM3()),
        ]
    ),
}


@dataclass(frozen=True)
class Case:
    """One engine."""

    stage: int
    policy: str = "elementwise"
    precision: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"ZeRO-{self.stage} {self.policy} {self.precision}{' offload' if self.zero else ''}"


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = (
    *(Case(stage, policy) for stage in (1, 2, 3) for policy in ("elementwise", "shared")),
    *(Case(stage, zero=OFFLOAD) for stage in (2, 3)),
    *(Case(stage, "shared", "bf16") for stage in (1, 2, 3)),
    *(Case(stage, "Adagrad") for stage in (2, 3)),
)
#: Those that another number of ranks trains, too.
ON_OTHER_RANKS = (Case(1, "elementwise"), Case(2, "shared"), Case(3, "elementwise"))
#: With the number of ranks.
EVERY_CASE = (*((WORLD, case) for case in CASES), *((OTHER_WORLD, case) for case in ON_OTHER_RANKS))


class Words(nn.Module):
    """Predicts the next word from the two before. The bias is what every policy keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Embedding(ROWS, DIM) for _ in range(2))
        self.head = nn.Linear(DIM, ROWS)

    def forward(self, words: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.first(words[:, 0]) + self.second(words[:, 1])).float(), words[:, 2])


def batches(rank: int) -> Tensor:
    """Word ids ``[steps, accumulated, 4, 3]`` of one rank. The third word follows from the first."""
    words = torch.randint(ROWS, (STEPS, ACCUMULATED, 4, 3), generator=torch.Generator().manual_seed(rank))
    words[..., 2] = (words[..., 0] + 1) % ROWS
    return words


def make(policy: str | None, world: int) -> tuple[nn.Module, Any, StepLR]:
    model = Words()
    groups = [
        {"params": [model.first.weight, model.second.weight, model.head.bias], "weight_decay": 0.0},
        {"params": [model.head.weight], "lr": 1e-2},
    ]
    if policy == "Adagrad":
        plain = torch.optim.Adagrad(groups, lr=2e-2, initial_accumulator_value=1e-3)
    else:
        plain = torch.optim.AdamW(groups, lr=2e-2, weight_decay=0.1)
    optimizer = compress(plain, model, POLICIES[policy]) if policy else plain
    return model, optimizer, StepLR(optimizer, 4 * world, gamma=0.5)  # Accelerate steps it once for each process


def one_process(policy: str, world: int) -> list[float]:
    """Losses of rank 0's batches in training on those of all ranks, without DeepSpeed or Accelerate."""
    model, optimizer, scheduler = make(policy, world)
    losses = []
    for step in zip(*map(batches, range(world)), strict=True):
        for rank, accumulated in enumerate(step):
            for words in accumulated:
                loss = model(words)
                (loss / (world * ACCUMULATED)).backward()
                losses += [loss.item()] if rank == 0 else []
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(world):
            scheduler.step()
    return losses


def accelerate(case: Case, **more: Any) -> Any:
    """An `Accelerator` under DeepSpeed, on CPU; `more` keys for DeepSpeed's configuration."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate keeps its state in the classes
    GradientState._reset_state()
    more = {"gradient_clipping": CLIP, "gradient_accumulation_steps": ACCUMULATED} | more
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(case.stage, case.precision, more, **case.zero)),
        mixed_precision="bf16" if case.precision == "bf16" else "no",
        # Without a backend, Accelerate believes on CPU that there is one process.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def train(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, data: Tensor) -> list[float]:
    losses = []
    for words in data.flatten(0, 1):
        with accelerator.accumulate(model):
            loss = model(words)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(optimizer: Any) -> dict[str, Any]:
    """The states and tensors of DeepSpeed's client, copied."""
    client = unwrap(optimizer)
    tensors = [p for group in client.param_groups for p in group["params"]]
    lrs = [group["lr"] for group in optimizer.param_groups]
    tree = {"lrs": lrs, "states": [dict(client.state[p]) for p in tensors], "tensors": tensors}
    return tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def train_and_resume(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Train and save on the way; then train the last steps once more, from what was saved."""
    accelerator, data = accelerate(case), batches(rank)
    first = accelerator.prepare(*make(case.policy, world))
    losses = train(accelerator, *first, data[:SAVED_AT])
    accelerator.save_state(f"{case}")
    losses += train(accelerator, *first, data[SAVED_AT:])
    found = {
        "processes": accelerator.num_processes,
        "client": type(unwrap(first[1])).__qualname__,
        "saved": report(first[1]).dense_state / report(first[1]).state,
        "losses": losses,
        "end": snapshot(first[1]),
        "resumed": [],
    }
    accelerator.free_memory()
    model, *others = make(case.policy, world)
    nn.init.zeros_(model.head.weight)
    second = accelerator.prepare(model, *others)
    for _ in range(2):  # into a new engine, and into one that has trained
        accelerator.load_state(f"{case}")
        losses = train(accelerator, *second, data[SAVED_AT:])
        found["resumed"].append({"losses": losses, "end": snapshot(second[1])})
    return found


class NoArithmetic:
    """In place of the library that DeepSpeed compiles for DeepSpeedCPUAdam, which takes minutes."""

    def create_adam(self, *_: Any) -> None: ...

    def destroy_adam(self, *_: Any) -> None: ...

    def adam_update(self, *_: Any) -> None:
        raise AssertionError("a parameter was stepped")


def errors(**checks: Callable[[], Any]) -> dict[str, str]:
    """What each raised."""
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = "no error"
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def exchange(rank: int, stage: int) -> dict[str, Any]:
    """Load plain states compressed, and compressed ones plain and under another policy."""
    case, data = Case(stage), batches(rank)

    def prepare(policy: str | None) -> tuple[Any, tuple[Any, Any, StepLR]]:
        accelerator = accelerate(case)
        return accelerator, accelerator.prepare(*make(policy, WORLD))

    accelerator, plain = prepare(None)
    train(accelerator, *plain, data[:SAVED_AT])
    accelerator.save_state(f"plain{stage}")
    losses = train(accelerator, *plain, data[SAVED_AT:])
    late = errors(compress=lambda: compress(plain[1], accelerator.unwrap_model(plain[0]), POLICIES["shared"]))

    accelerator, compressed = prepare("elementwise")
    accelerator.load_state(f"plain{stage}")
    joined = train(accelerator, *compressed, data[SAVED_AT:])
    accelerator.save_state(f"compressed{stage}")

    accelerator, plain = prepare(None)
    accelerator.load_state(f"compressed{stage}")
    left = errors(step=lambda: train(accelerator, *plain, data[:1]))
    accelerator = prepare("shared")[0]
    left |= errors(policy=lambda: accelerator.load_state(f"compressed{stage}"))
    return {"plain": losses, "joined": joined, **late, **left}


def replace(rank: int, case: Case) -> dict[str, str]:
    """Let Accelerate put DeepSpeedCPUAdam in the place of our optimizer."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder.load = lambda self, verbose=False: NoArithmetic()
    accelerator = accelerate(case, zero_force_ds_cpu_optimizer=True)  # DeepSpeed's default
    prepared = accelerator.prepare(*make(case.policy, WORLD))
    found = errors(attach=lambda: attach(prepared[0]), step=lambda: train(accelerator, *prepared, batches(rank)[:1]))
    return {"client": type(unwrap(prepared[1])).__qualname__, **found}


def on_any_number(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    os.environ["LOCAL_WORLD_SIZE"] = f"{world_size}"
    return {f"{case}": train_and_resume(rank, world_size, case) for world, case in EVERY_CASE if world == world_size}


def all_cases(rank: int, world_size: int) -> dict[str, Any]:
    found = on_any_number(rank, world_size)
    found["exchanged"] = [exchange(rank, stage) for stage in (1, 2, 3)]
    found["replaced"] = [replace(rank, Case(stage, "shared", zero=OFFLOAD)) for stage in (2, 3)]
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
    every = [rank[f"{case}"] for rank in any_ranks]
    for found in every:
        assert found["processes"] == world
        assert found["client"] == ("CompressedAdagrad" if case.policy == "Adagrad" else "CompressedAdamW")
        assert found["saved"] > 1.2
        assert found["end"]["lrs"] == [2e-2 / 2**4, 1e-2 / 2**4]
        assert sum(found["losses"][-20:]) < sum(found["losses"][:20])
    assert every[0]["losses"] != every[1]["losses"], "every rank has its own batches"


@pytest.mark.parametrize(("world", "case"), [each for each in EVERY_CASE if each[1].precision == "fp32"], ids=str)
def test_it_is_the_training_of_one_process(any_ranks, world, case):
    # Sketches and row means are per rank; the sums of gradients differ in rounding.
    close = 0.2 if case.policy == "shared" else 1e-5
    found = torch.tensor(any_ranks[0][f"{case}"]["losses"])
    torch.testing.assert_close(found, torch.tensor(one_process(case.policy, world)), rtol=0, atol=close)


@pytest.mark.parametrize(("world", "case"), EVERY_CASE, ids=str)
def test_save_state_and_load_state_are_exact(any_ranks, case):
    for rank in any_ranks:
        found = rank[f"{case}"]
        for resumed in found["resumed"]:
            assert resumed["losses"] == found["losses"][SAVED_AT * ACCUMULATED :]
            torch.testing.assert_close(resumed["end"], found["end"], rtol=0, atol=0)


def test_plain_states_are_compressed_when_they_are_loaded(ranks):
    for rank in ranks:
        for found in rank["exchanged"]:
            # first.weight in bfloat16, second.weight without momentum
            assert found["joined"][:ACCUMULATED] == found["plain"][:ACCUMULATED], "the same weights"
            assert found["joined"] != found["plain"]
            torch.testing.assert_close(torch.tensor(found["joined"]), torch.tensor(found["plain"]), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("compress", "ValueError: the optimizer holds no parameters of the model: an engine replaced them"),
        ("step", "RuntimeError: AdamW steps parameter groups that lightning_sketch compressed"),
        ("policy", "ValueError: this checkpoint does not fit the compressed optimizer; nothing was changed"),
    ],
)
def test_mistakes_are_named(ranks, mistake, message):
    for rank in ranks:
        for found in rank["exchanged"]:
            assert found[mistake].startswith(message)


def test_an_optimizer_that_takes_the_place_of_ours_never_steps(ranks):
    # The real thing is constructed and asked to step; only its compiled arithmetic is missing.
    for rank in ranks:
        for found in rank["replaced"]:
            assert found["client"] == "DeepSpeedCPUAdam"
            assert found["attach"].startswith("TypeError: the engine optimizes with DeepSpeedCPUAdam, not with a conv")
            assert found["step"].startswith("RuntimeError: DeepSpeedCPUAdam steps parameter groups that lightning_sk")
            assert all("zero_force_ds_cpu_optimizer=false" in found[at] for at in ("attach", "step"))
