"""Trainings under DeepSpeed, one for each thing that it does around the optimizer; every rank returns what it saw."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch import Policy, Rule, compress, decompress, report
from tests import tiny
from tests.deepspeed_tools import config, engine, init_deepspeed
from tests.zero.prescribed import (
    SHAPES,
    TABLES,
    Cells,
    gradients,
    held,
    lopsided_pair,
    policy,
    train,
)

WORLD, STEPS = 2, 6
MOMENTUM = tiny.Case(torch.optim.SGD, {"lr": 0.01, "momentum": 0.9})


@dataclass(frozen=True)
class Setup:
    """One configuration of DeepSpeed under which training is that of one process."""

    stage: int
    dtype: str = "fp32"
    more: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False

    def __str__(self) -> str:
        names = [*self.more, *(f"{k} {v}" for k, v in self.zero.items()), *(["zero.Init"] if self.zero_init else [])]
        return f"stage {self.stage} {self.dtype} {' '.join(names)}".strip()


def scaled(scale_power: int) -> dict[str, Any]:
    """Dynamic loss scaling that starts at ``2**scale_power``."""
    return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": scale_power, "hysteresis": 1}}


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SETUPS = [
    *[Setup(stage, "bf16") for stage in (0, 1, 2, 3)],
    Setup(1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),  # what selects BF16_Optimizer
    Setup(0, "fp16"),
    *[Setup(stage, "fp16", scaled(6)) for stage in (1, 2, 3)],
    *[Setup(stage, zero={"round_robin_gradients": True}) for stage in (1, 2)],
    Setup(2, zero={"parameter_alignment": True}),
    *[Setup(3, zero={"sub_group_size": size}) for size in (1, 300)],
    *[Setup(3, zero={"stage3_param_persistence_threshold": size}) for size in (100, 10**6)],
    *[Setup(3, dtype, zero_init=True) for dtype in ("fp32", "bf16")],
    *[Setup(stage, zero=OFFLOAD) for stage in (1, 2, 3)],
    *[Setup(stage, more={"gradient_accumulation_steps": 3}) for stage in (1, 3)],
]


def observe(rank: int, world_size: int, setup: Setup) -> dict[str, Any]:
    """Train under a setup."""
    import deepspeed

    settings = config(setup.stage, setup.dtype, setup.more, **setup.zero)
    with deepspeed.zero.Init(config_dict_or_path=settings) if setup.zero_init else nullcontext():
        model = Cells()
    empty = all(p.numel() == 0 for p in model.parameters())
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, policy())
    made = engine(model, optimizer, setup.stage, setup.dtype, setup.more, **setup.zero)
    fresh = not any(optimizer.state.values())
    train(made, range(STEPS), rank, world_size)
    return {"tensors": held(made), "fresh": fresh, "empty": empty}


def clipped(rank: int, world_size: int, stage: int) -> list[Any]:
    """Training with the gradient clipped far below its norm."""
    model = Cells()
    optimizer = compress(MOMENTUM.make(model.parameters()), model, BY_ELEMENT)
    made = engine(model, optimizer, stage, more={"gradient_clipping": 0.5})
    train(made, range(STEPS), rank, world_size)
    return held(made)


BY_ELEMENT = Policy([Rule(name=f"cells.{name}.weight", **tiny.CODECS["bfloat16"]) for name in TABLES])


def overflow(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """A step whose gradient overflows on one rank only, and one that does not."""
    model = Cells()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, policy())
    made = engine(model, optimizer, stage, "fp16", scaled(4))
    train(made, range(2), rank, world_size)
    before, scale = held(made), loss_scale(made)
    train(made, [2], rank, world_size, scale=1e30 if rank == 0 else 1)
    after = held(made)
    halved = loss_scale(made) / scale
    train(made, [3], rank, world_size)
    return {"before": before, "after": after, "halved": halved, "later": held(made)}


def loss_scale(made: Any) -> float:
    wrapper = made.optimizer
    return float(getattr(wrapper, "loss_scale_config", wrapper).cur_scale)


def scheduled(rank: int, world_size: int, source: str) -> dict[str, Any]:
    """A schedule of torch's, or one from DeepSpeed's configuration."""
    model = Cells()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, policy())
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 5}}
    torchs = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) if source == "torch" else None
    made = engine(model, optimizer, 3, more={} if torchs else {"scheduler": warmup}, lr_scheduler=torchs)
    rates = []
    for step in range(STEPS):
        rates.append(float(made.optimizer.param_groups[0]["lr"]))
        train(made, [step], rank, world_size)
    return {"tensors": held(made), "rates": rates}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with other hyperparameters, in another order than the model's."""
    params = list(model.parameters())
    return [{"params": params[1::2], "lr": 0.01}, {"params": params[::2], "weight_decay": 0.3, "betas": (0.5, 0.9)}]


def grouped(rank: int, world_size: int, stage: int) -> list[Any]:
    model = Cells()
    optimizer = compress(torch.optim.AdamW(two_groups(model)), model, policy())
    made = engine(model, optimizer, stage)
    train(made, range(STEPS), rank, world_size)
    return held(made)


def tied_and_frozen(rank: int, world_size: int, stage: int) -> list[Any]:
    model = partly_tied()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, BY_ELEMENT)
    made = engine(model, optimizer, stage)
    train(made, range(STEPS), rank, world_size)
    return held(made)


def partly_tied() -> Cells:
    """A compressed layer and a kept one are used twice, one of each is frozen."""
    model = Cells(SHAPES | {"again": TABLES["rows"], "kept_again": SHAPES["last"]})
    model.cells["again"].weight = model.cells["rows"].weight
    model.cells["kept_again"].weight = model.cells["last"].weight
    for name in ("SM3", "first"):
        model.cells[name].weight.requires_grad_(False)
    return model


def poisoned_padding(rank: int, world_size: int) -> list[Any]:
    """ZeRO-3 leaves padding uninitialized, so it may hold NaN. Coupled weight decay reads it."""
    model = Cells()
    optimizer = compress(tiny.ADAM.make(model.parameters()), model, policy())
    made = engine(model, optimizer, 3)
    for flat in made.optimizer.fp32_partitioned_groups_flat:
        padding = torch.ones_like(flat, dtype=torch.bool)
        for _, start, length, _ in next(t for t in held(made) if t["values"].numel() == flat.numel())["segments"]:
            padding[start : start + length] = False
        flat.data[padding] = torch.nan
        assert padding.any() or rank < world_size - 1
    train(made, range(STEPS), rank, world_size)
    return held(made)


def not_finite(rank: int, world_size: int, stage: int, nonfinite: Any, **zero: Any) -> dict[str, Any]:
    """In the second step one element of one table's gradient is NaN, on one rank.

    What is raised there is held back, so that the other ranks need not wait for this one: all is stepped by then.
    """
    model = Cells()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, policy(), nonfinite=nonfinite)
    said, step = [], optimizer.step

    def held_back(*args: Any) -> None:
        try:
            step(*args)
        except FloatingPointError as error:
            said.append(str(error))

    optimizer.step = held_back
    made = engine(model, optimizer, stage, **zero)
    train(made, [0], rank, world_size)
    before = held(made)
    given = gradients(1, rank, world_size)
    if rank == 0:
        given["sketch"][0, 0] = torch.nan  # under ZeRO, too, the first rows are rank 0's: no other sees this
    made.backward(made(given))
    made.step()
    after = held(made)
    train(made, [2], rank, world_size)
    return {
        "said": " ".join(said),
        "before": before,
        "after": after,
        "later": held(made),
        "skipped": dict(report(optimizer).skipped),
    }


# DeepSpeed looks at the norm of the gradient and then leaves the step out, unless it is told not to look.
UNSEEN = {
    "stage 0": (0, {}),
    "stage 1": (1, {"compute_grad_norm": False}),
    "stage 2": (2, {"compute_grad_norm": False}),
}


def lopsided(rank: int, world_size: int, stage: int) -> list[Any]:
    """Some ranks hold no compressed element."""
    made = engine(*lopsided_pair(), stage)
    train(made, range(STEPS), rank, world_size)
    return held(made)


def undone(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """Back to torch's own optimizer in the middle of training."""
    model = Cells()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, BY_ELEMENT)
    made = engine(model, optimizer, stage)
    train(made, range(4), rank, world_size)
    decompress(optimizer)
    train(made, range(4, STEPS), rank, world_size)
    return {"tensors": held(made), "class": type(optimizer).__qualname__}


def too_late(stage: int) -> str:
    """Conversion after DeepSpeed took the parameters away."""
    model = Cells()
    optimizer = tiny.ADAMW.make(model.parameters())
    engine(model, optimizer, stage)
    try:
        compress(optimizer, model, policy())
    except ValueError as error:
        return str(error)
    return ""


class Words(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.arange(200.0).view(50, 4) / 64, freeze=False, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens).sum()


def tokens(step: int, rank: int) -> Tensor:
    return torch.arange(8).mul(step + 3 * rank + 1).remainder(50)  # some on both ranks, some twice on one


def sparse_words(rank: int, world_size: int, case: tiny.Case) -> Tensor:
    """Stage 0 in fp32 hands over sparse gradients."""
    model = Words()
    optimizer = compress(case.make(model.parameters()), model, WORDS)
    made = engine(model, optimizer, 0)
    for step in range(STEPS):
        made.backward(made(tokens(step, rank)))
        made.step()
    return model.words.weight.detach().clone()


WORDS = Policy([Rule(role="embedding", **tiny.CODECS["sketch"])])
SPARSE = [tiny.Case(torch.optim.SparseAdam, {"lr": 0.05}), tiny.ADAMW, tiny.CASES[3]]


def everything(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    return {
        "setups": [observe(rank, world_size, setup) for setup in SETUPS],
        "clipped": {stage: clipped(rank, world_size, stage) for stage in (1, 3)},
        "overflow": {stage: overflow(rank, world_size, stage) for stage in (0, 1, 2, 3)},
        "scheduled": {source: scheduled(rank, world_size, source) for source in ("torch", "DeepSpeed")},
        "grouped": {stage: grouped(rank, world_size, stage) for stage in (1, 3)},
        "tied": {stage: tied_and_frozen(rank, world_size, stage) for stage in (1, 2, 3)},
        "undone": {stage: undone(rank, world_size, stage) for stage in (1, 3)},
        "lopsided": {stage: lopsided(rank, world_size, stage) for stage in (1, 3)},
        "too late": [too_late(stage) for stage in (1, 2, 3)],
        "padding": poisoned_padding(rank, world_size),
        "not finite": {
            f"{name} {how}": not_finite(rank, world_size, stage, how, **zero)
            for name, (stage, zero) in UNSEEN.items()
            for how in ("raise", "skip")
        },
        "seen": {stage: not_finite(rank, world_size, stage, "raise") for stage in (1, 2, 3)},
        "sparse": [sparse_words(rank, world_size, case) for case in SPARSE],
    }
