"""What DeepSpeed does around the optimizer: precision, scaling, clipping, accumulation, schedules, groups, offload."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sketch import compress, decompress
from tests import tiny
from tests.ranks import run_ranks
from tests.zero.engine_runs import (
    BY_ELEMENT,
    MOMENTUM,
    SETUPS,
    SPARSE,
    STEPS,
    UNSEEN,
    WORDS,
    WORLD,
    Setup,
    Words,
    everything,
    partly_tied,
    tokens,
    two_groups,
)
from tests.zero.prescribed import (
    LOPSIDED,
    TABLES,
    Cells,
    assemble,
    assert_alone,
    assert_kept,
    gradients,
    lopsided_pair,
    mean_gradients,
    one_process,
    policy,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, WORLD)


@pytest.fixture(scope="module")
def single() -> tuple[Any, Any]:
    return one_process(tiny.ADAMW, range(STEPS), WORLD)


def of(ranks: list[dict[str, Any]], *path: Any) -> list[Any]:
    """A result of every rank."""
    found: list[Any] = ranks
    for key in path:
        found = [rank[key] for rank in found]
    return found


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_training_is_that_of_one_process(ranks, single, setup):
    model, optimizer = single
    results = of(ranks, "setups", SETUPS.index(setup))
    tensors = [result["tensors"] for result in results]
    assert all(assert_alone(rank, optimizer, range(STEPS), WORLD) for rank in tensors)
    found = assemble(tensors)
    assert torch.equal(found["bf16"], model.cells["bf16"].weight)
    assert_kept(found, single)
    assert all(result["empty"] == setup.zero_init for result in results)
    for rank in tensors:
        assert {int(tensor["state"]["step"]) for tensor in rank if tensor["segments"]} == {STEPS}


@pytest.mark.parametrize("stage", [0, 1])
def test_construction_leaves_no_trace_in_the_state(ranks, stage):
    for rank in of(ranks, "setups", SETUPS.index(Setup(stage, "bf16"))):
        assert rank["fresh"]  # FP16_UnfusedOptimizer, which stage 0 has, steps once to have states allocated


@pytest.mark.parametrize("stage", [1, 3])
def test_the_optimizer_gets_clipped_gradients(ranks, stage):
    model = Cells()
    optimizer = compress(MOMENTUM.make(model.parameters()), model, BY_ELEMENT)
    for step in range(STEPS):
        for name, gradient in mean_gradients(step, WORLD).items():
            model.cells[name].weight.grad = gradient.clone()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 5
        optimizer.step()
    for name, found in assemble(of(ranks, "clipped", stage)).items():
        start, wanted = Cells().cells[name].weight.detach(), model.cells[name].weight.detach()
        torch.testing.assert_close(found - start, wanted - start, rtol=1e-2, atol=1e-5)  # bf16 rounds at other places


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_on_one_rank_changes_nothing_on_any(ranks, stage):
    for rank in of(ranks, "overflow", stage):
        tiny.assert_same(rank["after"], rank["before"])
        assert rank["halved"] == 0.5
    if stage:  # in stage 0 DeepSpeed divides gradients by a scale that it never multiplied with
        _, optimizer = one_process(tiny.ADAMW, [0, 1, 3], WORLD)
        for rank in of(ranks, "overflow", stage, "later"):
            assert assert_alone(rank, optimizer, [0, 1, 3], WORLD)


@pytest.mark.parametrize("source", ["torch", "DeepSpeed"])
def test_schedules_reach_compressed_layers(ranks, source):
    results = of(ranks, "scheduled", source)
    rates = results[0]["rates"]
    assert len(set(rates)) > 3
    single = one_process(tiny.ADAMW, range(STEPS), WORLD, rates)
    found = assemble([result["tensors"] for result in results])
    assert torch.equal(found["bf16"], single[0].cells["bf16"].weight)
    assert_kept(found, single)


@pytest.mark.parametrize("stage", [1, 3])
def test_every_group_keeps_its_hyperparameters(ranks, stage):
    model = Cells()
    optimizer = compress(torch.optim.AdamW(two_groups(model)), model, policy())
    for rank in of(ranks, "grouped", stage):
        assert assert_alone(rank, optimizer, range(STEPS), WORLD)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tied_layers_are_stepped_once_and_frozen_ones_not(ranks, stage):
    model = partly_tied()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, BY_ELEMENT)
    shapes = {name: tuple(cell.weight.shape) for name, cell in model.cells.items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        by_rank = [gradients(step, rank, WORLD, shapes) for rank in range(WORLD)]
        model({name: sum(g[name] for g in by_rank) / WORLD for name in shapes}).backward()
        optimizer.step()
    found = assemble(of(ranks, "tied", stage))
    assert {name for name, values in found.items() if values.isnan().all()} == {"SM3", "first"}  # held by no optimizer
    for name in found.keys() - {"SM3", "first"}:
        torch.testing.assert_close(found[name], model.cells[name].weight.detach(), rtol=0, atol=2e-6)
    for name in TABLES.keys() - {"SM3"}:
        assert torch.equal(found[name], model.cells[name].weight), name


@pytest.mark.parametrize("stage", [1, 3])
def test_decompression_in_the_middle_of_training(ranks, stage):
    model = Cells()
    optimizer = compress(tiny.ADAMW.make(model.parameters()), model, BY_ELEMENT)
    for step in range(STEPS):
        if step == 4:
            decompress(optimizer)
        for name, gradient in mean_gradients(step, WORLD).items():
            model.cells[name].weight.grad = gradient
        optimizer.step()
    assert {rank["class"] for rank in of(ranks, "undone", stage)} == {"AdamW"}
    for name, found in assemble(of(ranks, "undone", stage, "tensors")).items():
        torch.testing.assert_close(found, model.cells[name].weight.detach(), rtol=0, atol=2e-6)
    for tensor in of(ranks, "undone", stage, "tensors")[0]:
        assert set(tensor["state"]) == {"step", "exp_avg", "exp_avg_sq"}
        assert tensor["state"]["exp_avg"].shape == tensor["values"].shape


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_without_a_compressed_element_take_part(ranks, stage):
    model, optimizer = lopsided_pair()
    for step in range(STEPS):
        by_rank = [gradients(step, rank, WORLD, LOPSIDED) for rank in range(WORLD)]
        for name, cell in model.cells.items():
            cell.weight.grad = sum(g[name] for g in by_rank) / WORLD
        optimizer.step()
    found = assemble(of(ranks, "lopsided", stage), LOPSIDED)
    for name in LOPSIDED:
        torch.testing.assert_close(found[name], model.cells[name].weight.detach(), rtol=0, atol=2e-6)


def test_conversion_after_deepspeed_took_the_parameters_is_refused(ranks):
    for rank in ranks:
        for said in rank["too late"]:
            assert "before it is given to deepspeed.initialize" in said


def test_padding_reaches_no_state(ranks):
    single = one_process(tiny.ADAM, range(STEPS), WORLD)
    for rank in of(ranks, "padding"):
        for tensor in rank:
            assert all(bool(torch.as_tensor(value).isfinite().all()) for value in tensor["state"].values())
        assert assert_alone(rank, single[1], range(STEPS), WORLD)
    assert_kept(assemble(of(ranks, "padding")), single)


@pytest.mark.parametrize("how", ["raise", "skip"])
@pytest.mark.parametrize("name", UNSEEN)
def test_the_ranks_that_hold_a_row_leave_it_out_and_all_step_everything_else(ranks, name, how):
    found = of(ranks, "not finite", f"{name} {how}")
    for rank, outcome in enumerate(found):
        holds = rank == 0 or name == "stage 0"  # whole parameters, with the same gradients
        said = "NaN or inf in the gradient of cells.sketch.weight (1 row). They were left out" in outcome["said"]
        assert said == (holds and how == "raise")
        assert outcome["skipped"] == ({"cells.sketch.weight": 1} if holds and how == "skip" else {})
        for before, after, later in zip(outcome["before"], outcome["after"], outcome["later"], strict=True):
            steps = [float(tensor["state"]["step"]) for tensor in (before, after, later) if "step" in tensor["state"]]
            assert steps in ([], [1, 2, 3])
            assert all(bool(torch.as_tensor(x).isfinite().all()) for x in (after["values"], *after["state"].values()))
            for fqn, start, length, offset in after["segments"]:
                same = (after["values"] == before["values"])[start : start + length]
                if fqn == "cells.sketch.weight" and offset == 0:
                    width = TABLES["sketch"][1]
                    assert same[:width].all()
                    assert not same[width:].all()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_deepspeed_leaves_out_changes_nothing(ranks, stage):
    _, optimizer = one_process(tiny.ADAMW, [0, 2], WORLD)
    for rank in of(ranks, "seen", stage):
        assert not rank["said"]
        tiny.assert_same(rank["after"], rank["before"])
        assert assert_alone(rank["later"], optimizer, [0, 2], WORLD)


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_gradients_in_stage_0(ranks, case):
    model = Words()
    optimizer = compress(case.make(model.parameters()), model, WORDS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(torch.cat([tokens(step, rank) for rank in range(WORLD)])).backward()
        model.words.weight.grad /= WORLD
        optimizer.step()
    for found in of(ranks, "sparse", SPARSE.index(case)):
        torch.testing.assert_close(found, model.words.weight.detach(), rtol=0, atol=1e-6)
