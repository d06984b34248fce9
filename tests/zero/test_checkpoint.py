"""DeepSpeed's own checkpoints: resumed bit for bit where nothing changed, and refused where something did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import SGD, Adagrad, RMSprop

from lightning_sketch import Policy, compress, report
from tests import tiny
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.zero.prescribed import TABLES, Cells, held, lopsided_pair, policy, train

pytestmark = pytest.mark.distributed

WORLD = 2
ADAGRAD = tiny.Case(Adagrad, {"lr": 0.1})
RMSPROP = tiny.Case(RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5})
MOMENTUM = tiny.Case(SGD, {"lr": 0.01, "momentum": 0.9})


@dataclass(frozen=True)
class Setup:
    """What makes an engine."""

    stage: int
    dtype: str = "fp32"
    optimizer: tiny.Case = tiny.ADAMW
    more: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"stage {self.stage} {self.dtype} {self.optimizer} {' '.join([*self.more, *self.zero])}".strip()

    def build(self, chosen: Policy | None = None, *, plain: bool = False, groups: int = 1) -> tuple[Any, Any]:
        """An engine and its client."""
        model = Cells()
        params = list(model.parameters())
        optimizer = self.optimizer.make([{"params": params[i::groups]} for i in range(groups)])
        if not plain:
            compress(optimizer, model, chosen or policy())
        return engine(model, optimizer, self.stage, self.dtype, self.more, **self.zero), optimizer


BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SETUPS = [
    *[Setup(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")],
    *[Setup(stage, "fp16") for stage in (0, 1, 3)],
    Setup(1, "bf16", more=BF16_OPTIMIZER),
    *[Setup(stage, optimizer=case) for stage in (2, 3) for case in (ADAGRAD, RMSPROP, MOMENTUM)],
    Setup(2, zero={"round_robin_gradients": True}),
    Setup(3, zero={"sub_group_size": 300}),
    *[Setup(stage, zero=OFFLOAD) for stage in (2, 3)],
]


def resume(rank: int, world_size: int, build: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """Train, save, go on; and load into a fresh engine, and go on from there."""
    made = build()
    train(made, range(4), rank, world_size)
    made.save_checkpoint(str(folder), tag="four")
    saved = held(made)
    train(made, range(4, 6), rank, world_size)
    again = build()
    again.load_checkpoint(str(folder), tag="four")
    loaded = held(again)
    train(again, range(4, 6), rank, world_size)
    return {"saved": saved, "loaded": loaded, "undisturbed": held(made), "resumed": held(again)}


def load(made: Any, folder: Path) -> str:
    """Try to load; what was said."""
    try:
        made.load_checkpoint(str(folder), tag="four")
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def misfits(rank: int, world_size: int, stage: int, folder: Path) -> dict[str, Any]:
    """Load what was written under other decisions, into an engine that has trained."""
    setup, found = Setup(stage), {}
    written, _ = setup.build()
    train(written, range(4), rank, world_size)
    written.save_checkpoint(str(folder), tag="four")
    others: dict[str, Any] = {
        "seed": lambda: setup.build(policy(seed=7)),
        "policy": lambda: setup.build(policy(tables=list(TABLES)[1:])),
        "groups": lambda: setup.build(groups=2),
    }
    if stage < 3:
        others["layout"] = lambda: Setup(stage, zero={"round_robin_gradients": True}).build()
    for name, build in others.items():
        made, _ = build()
        train(made, range(2), rank, world_size)
        before = held(made)
        said = load(made, folder)
        states = [[tensor["state"] for tensor in tensors] for tensors in (before, held(made))]
        train(made, [2], rank, world_size)  # goes on
        found[name] = {"said": said, "states": states}
    return found


def from_dense(rank: int, world_size: int, setup: Setup, folder: Path) -> dict[str, Any]:
    """A checkpoint of the uncompressed optimizer, loaded into a compressed one: states are encoded."""
    plain, _ = setup.build(plain=True)
    train(plain, range(4), rank, world_size)
    plain.save_checkpoint(str(folder), tag="four")
    dense = held(plain)
    made, optimizer = setup.build()
    said = load(made, folder)
    encoded = held(made)
    train(made, range(4, 6), rank, world_size)
    errors = {name: dict(found) for name, found in report(optimizer).conversion_errors.items()}
    return {"said": said, "dense": dense, "encoded": encoded, "errors": errors, "step": steps(made)}


def steps(made: Any) -> list[int]:
    return [int(tensor["state"]["step"]) for tensor in held(made) if tensor["segments"]]


def deepspeeds_other_formats(rank: int, world_size: int, stage: int) -> dict[str, str]:
    """Elastic and universal checkpoints know no states but Adam's."""
    elastic = Setup(stage, zero={"elastic_checkpoint": True}) if stage < 3 else None
    universal = Setup(stage, more={"checkpoint": {"load_universal": True}})
    found = {}
    for name, setup in {"elastic": elastic, "universal": universal}.items():
        if setup is not None:
            made, _ = setup.build()
            try:
                train(made, [0], rank, world_size)
                found[name] = ""
            except RuntimeError as error:
                found[name] = str(error)
    return found


def everything(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    shared: list[Any] = [None]
    with TemporaryDirectory() as own:
        shared[0] = own
        dist.broadcast_object_list(shared)
        root = Path(shared[0])
        found: dict[str, Any] = {
            "resume": [
                resume(rank, world_size, lambda setup=setup: setup.build()[0], root / f"{i}")
                for i, setup in enumerate(SETUPS)
            ],
            "lopsided": resume(rank, world_size, lambda: engine(*lopsided_pair(), 1), root / "lopsided"),
            "misfits": {stage: misfits(rank, world_size, stage, root / f"misfit {stage}") for stage in (1, 3)},
            "dense": [from_dense(rank, world_size, setup, root / f"dense {i}") for i, setup in enumerate(DENSE)],
            "other formats": {stage: deepspeeds_other_formats(rank, world_size, stage) for stage in (1, 2, 3)},
        }
        dist.barrier()
    return found


DENSE = [*[Setup(stage) for stage in (0, 1, 2, 3)], Setup(2, "bf16"), Setup(1, "bf16", more=BF16_OPTIMIZER)]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, WORLD)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_checkpoint_resumes_bit_for_bit(ranks, setup):
    for rank in ranks:
        found = rank["resume"][SETUPS.index(setup)]
        tiny.assert_same(found["loaded"], found["saved"])
        tiny.assert_same(found["resumed"], found["undisturbed"])
        assert any(len(tensor["state"]) > 3 for tensor in found["loaded"])


MESSAGES = {
    "seed": "its hash seed in the checkpoint",
    "policy": "cells.sketch.weight: compressed in the checkpoint",
    "layout": "lightning_sketch.restore(engine, directory)",
    "groups": "",  # says DeepSpeed in ZeRO-1 and -2, and the optimizer in ZeRO-3
}


def test_ranks_without_a_compressed_element_resume_bit_for_bit(ranks):
    for rank in ranks:
        tiny.assert_same(rank["lopsided"]["loaded"], rank["lopsided"]["saved"])
        tiny.assert_same(rank["lopsided"]["resumed"], rank["lopsided"]["undisturbed"])


@pytest.mark.parametrize(
    ("stage", "what"), [(stage, what) for stage in (1, 3) for what in MESSAGES if (stage, what) != (3, "layout")]
)
def test_what_does_not_fit_is_refused_and_changes_no_state(ranks, stage, what):
    for rank in ranks:
        found = rank["misfits"][stage][what]
        assert found["said"]
        assert MESSAGES[what] in found["said"]
        before, after = found["states"]
        tiny.assert_same(after, before)


@pytest.mark.parametrize("setup", DENSE, ids=str)
def test_a_dense_checkpoint_is_encoded(ranks, setup):
    for rank in ranks:
        found = rank["dense"][DENSE.index(setup)]
        assert not found["said"]
        assert set(found["step"]) == {6}
        for dense, encoded in zip(found["dense"], found["encoded"], strict=True):
            tiny.assert_same(encoded["values"], dense["values"])
            for fqn, start, length, _ in dense["segments"]:
                if fqn == "cells.bf16.weight":
                    for name in ("exp_avg", "exp_avg_sq"):
                        wanted = dense["state"][name].flatten()[start : start + length]
                        parts = [v.flatten() for k, v in encoded["state"].items() if k.endswith(name) and fqn in k]
                        got = torch.cat(parts) if parts else encoded["state"][name].flatten()
                        torch.testing.assert_close(got.float(), wanted, rtol=2**-7, atol=0)
        assert any("rows" in name and max(errors.values()) > 0 for name, errors in found["errors"].items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_formats_for_adam_only_are_refused_with_the_way_round(ranks, stage):
    for rank in ranks:
        said = rank["other formats"][stage]
        assert set(said) == ({"elastic", "universal"} if stage < 3 else {"universal"})
        for name, message in said.items():
            assert name in message
            assert "lightning_sketch.restore(engine, directory)" in message
