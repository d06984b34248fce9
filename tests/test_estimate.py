"""What each rank would hold, against live optimizers: to the byte, for every codec, under every engine."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

from lightning_sketch import Policy, Rule, compress, estimate_memory, plan, report
from lightning_sketch.sharding import local
from tests.deepspeed_tools import engine, init_deepspeed
from tests.fsdp2.tools import ROWS, make_net, net_policy, tokens_of, train_net
from tests.ranks import run_ranks
from tests.tiny import CASES, CODECS, FOR_SGD, Tiny, on_table, train

WORLD_SIZES = (2, 3)
KEPT = Policy([Rule(name="*")])
STAGES = (1, 2, 3)


def live(optimizer: Any) -> dict[str, int]:
    """Bytes by codec without step counts."""
    found = dict(report(optimizer).state_by_codec)
    counts = [state["step"] for state in optimizer.state.values() if isinstance(state.get("step"), torch.Tensor)]
    found["Keep"] -= sum(local(count).nbytes for count in counts)
    return {codec: count for codec, count in found.items() if count}


def estimated(engine: Any, world_size: int, rank: int, policy: Policy | None = None) -> dict[str, int]:
    with torch.device("meta"):
        model = make_net()
    made = estimate_memory(
        model, AdamW(model.parameters()), policy or net_policy(), engine=engine, world_size=world_size
    )
    here = made.ranks[rank]
    assert here.state == sum(here.state_by_layer.values())
    return {codec: count for codec, count in here.state_by_codec.items() if count}


def under_fsdp2(rank: int, world_size: int) -> tuple[dict[str, int], int]:
    model = make_net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = compress(AdamW(model.parameters(), lr=0.01), model, net_policy())
    train_net(model, optimizer, rank, range(1))
    return live(optimizer), sum(local(param).nbytes for param in model.parameters())


def under_zero(rank: int, world_size: int) -> dict[int, tuple[dict[str, int], dict[str, int], int]]:
    """By stage: of a compressed and of a kept optimizer, and bytes of what the former steps."""
    init_deepspeed(rank, world_size)
    found = {}
    for stage in STAGES:
        kinds = []
        for policy in (net_policy(), KEPT):
            model = make_net()
            optimizer = compress(AdamW(model.parameters(), lr=0.01), model, policy)
            trained = engine(model, optimizer, stage)
            tokens = tokens_of(rank, 0)
            trained.backward(nn.functional.cross_entropy(trained(tokens), (tokens + 1) % ROWS))
            trained.step()
            kinds.append(live(optimizer))
        stepped = sum(param.nbytes for group in trained.optimizer.optimizer.param_groups for param in group["params"])
        found[stage] = (*kinds, stepped)
    return found


@functools.cache
def run(function: Any, world_size: int) -> list[Any]:
    return run_ranks(function, world_size)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_fsdp2(world_size):
    for rank, (states, parameters) in enumerate(run(under_fsdp2, world_size)):
        assert estimated("fsdp2", world_size, rank) == states
        with torch.device("meta"):
            model = make_net()
        made = estimate_memory(model, AdamW(model.parameters()), engine="fsdp2", world_size=world_size)
        assert made.ranks[rank].parameters == made.ranks[rank].gradients == parameters


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_zero(world_size, stage):
    for rank, by_stage in enumerate(run(under_zero, world_size)):
        compressed, kept, _ = by_stage[stage]
        assert estimated(f"zero{stage}", world_size, rank) == compressed
        assert estimated(f"zero{stage}", world_size, rank, KEPT) == kept


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process(case, codecs):
    if case.cls is SGD and codecs not in FOR_SGD:
        codecs = "bfloat16"
    model = Tiny(rows=37)
    optimizer = case.make(model.parameters())
    made = estimate_memory(model, optimizer, on_table(**CODECS[codecs]))
    optimizer = compress(optimizer, model, on_table(**CODECS[codecs]))
    train(model, optimizer, range(2), sparse=case.sparse)
    (rank,) = made.ranks
    assert {codec: count for codec, count in rank.state_by_codec.items() if count} == live(optimizer)
    assert rank.parameters == report(optimizer).parameters
    assert rank.dense_state == made.plan.bytes_before


def test_what_amsgrad_keeps_of_kept_layers_is_counted():
    model = nn.ModuleDict({"table": nn.Embedding(50, 8), "head": nn.Linear(8, 50)})
    optimizer = with_amsgrad(model)
    policy = Policy([Rule(role="embedding", exp_avg="Drop", exp_avg_sq="RowWise")])
    made, planned = estimate_memory(model, optimizer, policy), plan(model, optimizer, policy)
    compress(optimizer, model, policy)
    model["head"](model["table"](torch.arange(4))).sum().backward()
    optimizer.step()
    states = [optimizer.state[param] for param in model["head"].parameters()]
    kept = sum(value.nbytes for state in states for key, value in state.items() if key != "step")
    assert kept == 3 * 4 * (8 * 50 + 50)
    steps = 4 * 3
    assert made.ranks[0].state == planned.bytes_after == report(optimizer).state - steps
    budget = planned.bytes_before - 1  # exact states do not fit
    fresh = with_amsgrad(model)
    assert plan(model, fresh, Policy.for_budget(model, fresh, budget)).bytes_after <= budget


def with_amsgrad(model: Any) -> AdamW:
    """Of the head only."""
    head = {"params": model["head"].parameters(), "amsgrad": True}
    return AdamW([{"params": model["table"].parameters()}, head])


def test_frozen_and_other_parameters_are_held_and_take_no_state():
    model = nn.ModuleDict({"trained": nn.Linear(4, 4), "frozen": nn.Linear(4, 4), "apart": nn.Linear(4, 4)})
    model["frozen"].requires_grad_(False)
    parameters = [*model["trained"].parameters(), *model["frozen"].parameters()]
    (rank,) = estimate_memory(model, AdamW(parameters)).ranks
    assert (rank.parameters, rank.gradients, rank.state) == (3 * 80, 80, 2 * 80)


def test_sparse_gradients_depend_on_the_batch_and_are_not_counted():
    model = nn.ModuleList([nn.Embedding(100, 4, sparse=True), nn.Linear(4, 4)])
    (rank,) = estimate_memory(model, SGD(model.parameters(), lr=0.1)).ranks
    assert rank.gradients == 80


def test_the_table_is_of_the_fullest_rank():
    model = nn.Embedding(10, 256)
    made = estimate_memory(model, AdamW(model.parameters()), KEPT, engine="fsdp2", world_size=4)
    assert [rank.state for rank in made.ranks] == [2 * 3072, 2 * 3072, 2 * 3072, 2 * 1024]
    text = str(made)
    assert "each of 4 ranks, fsdp2, at most" in text
    assert "6.00 KiB" in text


@pytest.mark.parametrize("stage", STAGES)
def test_of_a_thousand_ranks_those_that_hold_as_much_are_counted_once(stage):
    shape, world_size = (1 << 15, 96), 1024
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(*shape), nn.Linear(96, 96, bias=False))
    policy = Policy([Rule(name="0.*", exp_avg="BFloat16", exp_avg_sq="RowWise")])
    made = estimate_memory(model, AdamW(model.parameters()), policy, engine=f"zero{stage}", world_size=world_size)
    assert len(made.ranks) == world_size
    assert len({id(rank) for rank in made.ranks}) <= 64
    assert sum(rank.state_by_codec.get("BFloat16", 0) for rank in made.ranks) == 2 * shape[0] * shape[1]
    assert sum(rank.state_by_codec.get("Keep", 0) for rank in made.ranks) == 2 * 4 * 96 * 96


def test_a_dictionary_for_json_has_layers_and_ranks():
    model = nn.Embedding(20_000, 4)
    found = estimate_memory(model, AdamW(model.parameters())).to_dict()
    assert found["layers"][0]["codecs"]["exp_avg"] == {"codec": "Drop"}
    assert found["ranks"][0]["state_by_layer"] == {"weight": 4 * (20_000 + 4) + 8}


@pytest.mark.parametrize(
    ("wrong", "message"), [({"engine": "fsdp1"}, "engine='fsdp1'"), ({"world_size": 0}, "world_size=0")]
)
def test_what_is_no_engine_or_number_of_ranks_is_refused(wrong, message):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        estimate_memory(model, AdamW(model.parameters()), **wrong)
