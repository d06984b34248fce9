"""`decompress` under ZeRO: every flat tensor is decoded with the options of its own parameter group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sketch import Policy, Rule, compress, decompress
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.tiny import EXACT
from tests.zero.prescribed import Cells, assemble, gradients, held, short, train

pytestmark = pytest.mark.distributed

WORLD, STEPS = 2, 4
SHAPES: dict[str, tuple[int, ...]] = {"first": (9, 4), "other": (3, 2), "second": (7, 5), "one_row": (1, 2)}
#: Each group's layers and its ``initial_accumulator_value``. Of the last group rank 1 holds nothing but padding.
GROUPS = [(("first", "other"), 0.5), (("second",), 2.0), (("one_row",), 8.0)]
POLICY = Policy([Rule(name=f"cells.{name}.weight", sum=EXACT) for name in SHAPES])
STAGES = (1, 2, 3)


def make() -> tuple[Cells, Any]:
    """The model, and Adagrad over groups that begin with different sums."""
    model = Cells(SHAPES)
    groups = [
        {"params": [model.cells[name].weight for name in names], "initial_accumulator_value": value}
        for names, value in GROUPS
    ]
    return model, compress(torch.optim.Adagrad(groups, lr=0.1), model, POLICY)


def observe(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """What is held after decompression in the middle of training, and at its end."""
    model, optimizer = make()
    made = engine(model, optimizer, stage)
    train(made, range(STEPS), rank, world_size)
    values = [optimizer.flat_group(flat)["initial_accumulator_value"] for flat in optimizer.compression.flat]
    decompress(optimizer)
    decompressed = held(made)
    train(made, range(STEPS, 2 * STEPS), rank, world_size)
    end = {"end": held(made), "class": type(optimizer).__qualname__}
    return {"values": values, "decompressed": decompressed} | end


def everything(rank: int, world_size: int) -> dict[int, dict[str, Any]]:
    init_deepspeed(rank, world_size)
    return {stage: observe(rank, world_size, stage) for stage in STAGES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[int, dict[str, Any]]]:
    return run_ranks(everything, WORLD)


def mean_gradients(step: int) -> dict[str, Tensor]:
    by_rank = [gradients(step, rank, WORLD, SHAPES) for rank in range(WORLD)]
    return {name: sum(g[name] for g in by_rank) / WORLD for name in SHAPES}


def step_alone(model: Cells, optimizer: Any, steps: Iterable[int]) -> None:
    for step in steps:
        for name, gradient in mean_gradients(step).items():
            model.cells[name].weight.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("stage", STAGES)
def test_a_flat_tensor_finds_its_own_group(ranks, stage):
    for rank in ranks:
        for found, tensor in zip(rank[stage]["values"], rank[stage]["decompressed"], strict=True):
            for fqn, *_ in tensor["segments"]:
                assert found == next(value for names, value in GROUPS if short(fqn) in names)
        assert sorted(rank[stage]["values"]) == [value for _, value in GROUPS], "where there is padding only, too"


@pytest.mark.parametrize("stage", STAGES)
def test_the_decoded_sums_began_at_the_value_of_their_own_group(ranks, stage):
    tensors = [
        [tensor | {"values": tensor["state"]["sum"]} for tensor in rank[stage]["decompressed"]] for rank in ranks
    ]
    sums = assemble(tensors, SHAPES)
    for names, value in GROUPS:
        for name in names:
            squares = torch.stack([mean_gradients(step)[name].square() for step in range(STEPS)])
            torch.testing.assert_close(sums[name], value + squares.sum(0), msg=lambda m, name=name: f"{name}: {m}")
    padding_only = [not tensor["segments"] for tensor in ranks[1][stage]["decompressed"]]
    assert any(padding_only) == (stage < 3), "ZeRO-3 cuts every layer"


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_as_in_one_process(ranks, stage):
    model, optimizer = make()
    step_alone(model, optimizer, range(STEPS))
    decompress(optimizer)
    step_alone(model, optimizer, range(STEPS, 2 * STEPS))
    for name, found in assemble([rank[stage]["end"] for rank in ranks], SHAPES).items():
        wanted = model.cells[name].weight.detach()
        torch.testing.assert_close(found, wanted, msg=lambda m, name=name: f"{name}: {m}")
    assert {rank[stage]["class"] for rank in ranks} == {"Adagrad"}
