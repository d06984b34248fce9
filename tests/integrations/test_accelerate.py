"""Accelerate: ``optimizer = compress(optimizer, model, policy)`` before ``accelerator.prepare``, or after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_sketch import SM3, BFloat16, CountSketch, Policy, RowWise, Rule, compress, report
from lightning_sketch.optimizer.classes import CompressedAdamW

ROWS = 60
POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=BFloat16(), exp_avg_sq=SM3()),
        Rule(name="head.weight", exp_avg=CountSketch(compression=4), exp_avg_sq=CountSketch(compression=4)),
    ]
)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in the classes."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Words(nn.Module):
    """Predicts the next word from the one before. The bias is what the policy keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, 6)
        self.head = nn.Linear(6, ROWS)

    def forward(self, words: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.embedding(words[:, 0])), words[:, 1])


def make(dtype: torch.dtype = torch.float32, lr: float = 1e-2) -> tuple[Words, AdamW]:
    torch.manual_seed(1)
    model = Words().to(dtype)
    return model, AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def batches(count: int, first: int = 0) -> list[Tensor]:
    """Batches ``[8, 2]`` of words, half of which a batch does not see."""
    return [torch.randint(ROWS // 2, (8, 2), generator=torch.Generator().manual_seed(first + i)) for i in range(count)]


def train(
    model: Callable[[Tensor], Tensor],
    optimizer: Any,
    data: list[Tensor],
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> list[float]:
    losses = []
    for words in data:
        loss = model(words)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def states(optimizer: Any) -> dict[str, Any]:
    """Every state, by parameter index and key."""
    return {f"{i}.{k}": v for i, state in optimizer.state_dict()["state"].items() for k, v in state.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, dtypes included."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_bit_for_bit_that_of_the_plain_loop(dtype):
    model, optimizer = make(dtype)
    train(model, compress(optimizer, model, POLICY), batches(12))

    accelerator = Accelerator(cpu=True)
    same, other = make(dtype)
    same, prepared = accelerator.prepare(same, compress(other, same, POLICY))
    train(same, prepared, batches(12), accelerator.backward)

    assert_same(same.state_dict(), model.state_dict())
    assert_same(states(prepared), states(optimizer))


def test_prepare_keeps_float32_states_of_a_bfloat16_model():
    model, optimizer = make(torch.bfloat16)
    compress(optimizer, model, POLICY)
    train(model, optimizer, batches(3))
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in states(optimizer).items()}

    prepared = Accelerator(cpu=True).prepare(optimizer)  # passes the states through load_state_dict

    assert before["1.exp_avg_table"].dtype == torch.float32
    assert_same(states(prepared), before)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("trained", [0, 2])
def test_compress_after_prepare_is_compress_before(scaled, trained):
    def run(*, after: bool) -> tuple[dict[str, Any], Optimizer]:
        model, optimizer = make()
        Accelerator(cpu=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        backward = (lambda loss: scaler.scale(loss).backward()) if scaled else Tensor.backward
        early, late = batches(trained), batches(5, first=trained)
        prepared = AcceleratedOptimizer(optimizer, scaler=scaler)  # as prepare() makes it; a scaler only on a GPU
        train(model, prepared, early, backward)
        if after:
            assert compress(prepared, model, POLICY) is prepared
        else:
            compress(optimizer, model, POLICY)
            prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
        train(model, prepared, late, backward)
        return model.state_dict() | states(prepared), prepared.optimizer

    (after, optimizer), (before, _) = run(after=True), run(after=False)
    assert type(optimizer) is CompressedAdamW
    assert_same(after, before)


def test_accumulated_gradients_make_one_step():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = make()
    compress(optimizer, model, POLICY)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    data = DataLoader(torch.cat(batches(8)), batch_size=8)
    model, prepared, data = accelerator.prepare(model, optimizer, data)
    for words in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(words))
            prepared.step()
            prepared.zero_grad()
    assert len(steps) == 3  # 3 + 3 batches, and the 2 that are left

    plain, by_hand = make()
    compress(by_hand, plain, POLICY)
    for i, words in enumerate(batches(8), start=1):
        (plain(words) / 3).backward()
        if i % 3 == 0 or i == 8:
            by_hand.step()
            by_hand.zero_grad()
    assert_same(model.state_dict(), plain.state_dict())


def test_clipped_gradients_reach_compressed_layers():
    def run(step: Callable[[Any, Any], None]) -> tuple[Words, Any]:
        model, optimizer = make()
        compress(optimizer, model, POLICY)
        step(model, optimizer)
        return model, optimizer

    def clipped_by_accelerate(model: Any, optimizer: Any) -> None:
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        for words in batches(6):
            accelerator.backward(model(words))
            assert accelerator.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            optimizer.step()
            optimizer.zero_grad()

    def clipped_by_hand(model: Any, optimizer: Any) -> None:
        for words in batches(6):
            model(words).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = run(clipped_by_accelerate)
    same, other = run(clipped_by_hand)
    assert_same(model.state_dict(), same.state_dict())
    assert_same(states(optimizer), states(other))


@pytest.mark.parametrize("compressed", ["before the scheduler", "after the scheduler", "after prepare"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
            ],
            milestones=[3],
        ),
    ],
    ids=["StepLR", "OneCycleLR", "SequentialLR"],
)
def test_every_step_has_the_learning_rate_of_the_plain_run(schedule, compressed):
    def learning_rates(when: str | None) -> list[float]:
        seen: list[float] = []
        accelerator = Accelerator(cpu=True)
        model, optimizer = make()
        optimizer.register_step_pre_hook(lambda self, *_: seen.append(self.param_groups[0]["lr"]))
        if when == "before the scheduler":
            compress(optimizer, model, POLICY)
        scheduler = schedule(optimizer)
        if when == "after the scheduler":
            compress(optimizer, model, POLICY)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if when == "after prepare":
            compress(optimizer, model, POLICY)
        for words in batches(8):
            train(model, optimizer, [words], accelerator.backward)
            scheduler.step()
        assert isinstance(optimizer.optimizer, CompressedAdamW) == (when is not None)
        return seen

    plain = learning_rates(None)
    assert len(set(plain)) > 2
    assert learning_rates(compressed) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_undisturbed_one(dtype):
    def start() -> tuple[Accelerator, nn.Module, Any, Any]:
        accelerator = Accelerator(cpu=True)
        model, optimizer = make(dtype)
        compress(optimizer, model, POLICY)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    def run(model: nn.Module, optimizer: Any, scheduler: Any, data: list[Tensor]) -> None:
        for words in data:
            train(model, optimizer, [words])
            scheduler.step()

    accelerator, model, optimizer, scheduler = start()
    run(model, optimizer, scheduler, batches(5))
    accelerator.save_state("state")
    run(model, optimizer, scheduler, batches(5, first=5))

    accelerator, resumed, other, scheduler = start()
    accelerator.load_state("state")  # weights_only
    run(resumed, other, scheduler, batches(5, first=5))

    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(states(other), states(optimizer))


def test_a_checkpoint_is_primitives_and_tensors():
    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    model, optimizer = accelerator.prepare(model, compress(optimizer, model, POLICY))
    train(model, optimizer, batches(2))
    accelerator.save_state("state")
    saved = torch.load("state/optimizer.bin", weights_only=True)
    assert_same(saved["state"], optimizer.state_dict()["state"])


def test_a_dense_checkpoint_resumes_compressed():
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*make())
    train(model, optimizer, batches(4))
    accelerator.save_state("dense")
    dense = optimizer.state_dict()["state"][0]["exp_avg_sq"]
    AcceleratorState._reset_state(reset_partial_state=True)

    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    policy = Policy([Rule(role="embedding", exp_avg=BFloat16(), exp_avg_sq=RowWise())])
    model, optimizer = accelerator.prepare(model, compress(optimizer, model, policy))
    accelerator.load_state("dense")

    state = optimizer.optimizer.state[model.embedding.weight]
    torch.testing.assert_close(state["exp_avg_sq_row"] * state["exp_avg_sq_scale"], dense.mean(dim=1))
    assert 0 < report(optimizer).conversion_errors["embedding.weight"]["exp_avg"] < 0.01
    train(model, optimizer, batches(4, first=4))
    assert float(state["step"]) == 8


def test_mixed_precision_computes_in_bfloat16_and_updates_in_float32():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = make()
    model, optimizer = accelerator.prepare(model, compress(optimizer, model, POLICY))
    assert model.head(model.embedding.weight).dtype == torch.float32
    with accelerator.autocast():
        assert model.head(model.embedding.weight).dtype == torch.bfloat16
    losses = train(model, optimizer, batches(1) * 30, accelerator.backward)

    plain, by_hand = make()
    compress(by_hand, plain, POLICY)

    def forward(words: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(words)

    expected = train(forward, by_hand, batches(1) * 30)
    assert losses == expected
    assert losses[-1] < 0.9 * losses[0]
    assert_same(model.state_dict(), plain.state_dict())
    assert states(optimizer)["1.exp_avg_table"].dtype == torch.float32


def test_hooks_of_the_optimizer_fire_once_a_step():
    model, optimizer = make()
    fired = []
    for event in ("step_pre", "step_post", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        getattr(optimizer, f"register_{event}_hook")(lambda *_, event=event: fired.append(event))
    compress(optimizer, model, POLICY)
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)  # a round trip of the state dict
    assert fired == ["state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
    fired.clear()
    train(model, prepared, batches(2))
    assert fired == ["step_pre", "step_post"] * 2
