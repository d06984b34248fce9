"""Optimizers without a rule under DistributedDataParallel and FSDP2, on real ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_sketch import CountSketch, Policy, Rule, compress
from lightning_sketch.sharding import local
from tests.ranks import run_ranks
from tests.stock.optimizers import BF16, LION, MUON, NADAM, SCHEDULE_FREE, Matrices
from tests.tiny import EXACT, assert_same, snapshot

pytestmark = pytest.mark.distributed

SOME = (NADAM, MUON, LION, SCHEDULE_FREE)
EXACTLY = Policy([Rule(name=["table.*", "hidden.*"], first_moment=EXACT, second_moment=EXACT)])


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0) -> None:
    for step in steps:
        optimizer.zero_grad()
        ids = (torch.arange(8) * (step + 3) + rank) % 30
        model(ids).square().mean().backward()
        optimizer.step()


def sharded(case: Any, policy: Policy | None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Matrices()
    fully_shard(model)
    optimizer = case.make(model.parameters())
    return model, optimizer if policy is None else compress(optimizer, model, policy)


def held(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What this rank holds of parameters and states."""
    found = snapshot(model, optimizer)
    return {key: local(value).clone() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def replica(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for case in SOME:
        torch.manual_seed(0)
        model = DistributedDataParallel(Matrices())
        optimizer = compress(case.make(model.parameters()), model, BF16)
        train(model, optimizer, range(5), rank)
        found[str(case)] = snapshot(model.module, optimizer)
    return found


def test_replicas_are_bit_identical():
    first, second = run_ranks(replica, 2)
    assert_same(first, second)
    assert first["torch.NAdam"]["table.weight.exp_avg"].dtype == torch.bfloat16


def shard(rank: int, world_size: int) -> dict[str, Any]:
    CountSketch.elementwise = True  # stores exactly, in another form
    found: dict[str, Any] = {}
    for case in SOME:
        plain_model, plain = sharded(case, None)
        train(plain_model, plain, range(3), rank)
        model, optimizer = sharded(case, EXACTLY)
        train(model, optimizer, range(3), rank)
        for a, b in zip(plain_model.parameters(), model.parameters(), strict=True):
            assert torch.equal(local(a), local(b)), case

        model, optimizer = sharded(case, BF16)
        train(model, optimizer, range(3), rank)
        saved = optimizer.state_dict()
        resumed_model, resumed = sharded(case, BF16)
        resumed_model.load_state_dict(model.state_dict())
        resumed.load_state_dict(saved)
        assert_same(held(resumed_model, resumed), held(model, optimizer))
        if case is not LION:  # torch makes states for it, with a learning rate of 0, which Lion refuses
            gathered_model, gathered = sharded(case, BF16)
            gathered_model.load_state_dict(model.state_dict())
            copied = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # torch loads tensors without copying
            set_optimizer_state_dict(gathered_model, gathered, copied)
            for other_model, other in ((model, optimizer), (gathered_model, gathered)):
                train(other_model, other, range(3, 5), rank)
            assert_same(held(gathered_model, gathered), held(model, optimizer))
        entry = {key: value for key, value in optimizer.state[model.table.weight].items() if key != "z"}
        found[str(case)] = {key: value for key, value in entry.items() if isinstance(value, torch.Tensor)}
    return found


def test_shards_train_save_and_resume_as_the_optimizer_does():
    first, second = run_ranks(shard, 2)
    for case, entry in first.items():
        states = [key for key, value in entry.items() if value.ndim]
        assert states, case
        for key in states:
            assert entry[key].shape == second[case][key].shape == (15, 4)
            assert entry[key].dtype == torch.bfloat16


def alike(rank: int, world_size: int) -> dict[str, Any]:
    """The same data on both ranks: what one process does."""
    model, optimizer = sharded(NADAM, BF16)
    train(model, optimizer, range(3))
    return {key: value for key, value in held(model, optimizer).items() if value.ndim == 2}


def test_shards_round_as_one_process_does():
    torch.manual_seed(0)
    model = Matrices()
    optimizer = compress(NADAM.make(model.parameters()), model, BF16)
    train(model, optimizer, range(3))
    whole = {key: value for key, value in snapshot(model, optimizer).items() if value.ndim == 2}
    ranks = run_ranks(alike, 2)
    for key, expected in whole.items():
        torch.testing.assert_close(torch.cat([rank[key] for rank in ranks]), expected, rtol=0, atol=0, msg=key)
