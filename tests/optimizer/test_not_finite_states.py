"""Dense states with NaN or inf are refused by name where a codec would spread them over other elements."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, NAdam

from lightning_sketch import (
    SM3,
    BFloat16,
    CountSketch,
    Factored,
    Keep,
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
    restore,
)
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from tests.ranks import run_ranks
from tests.tiny import assert_same

SPREADING = [RowWise(), RowWise(compression=4), Factored(), SM3(), CountSketch(3), Quantized()]
APART = [BFloat16(), Keep()]
every_codec = pytest.mark.parametrize("codec", SPREADING, ids=str)


def trained(bad: float | None = None, cls: Any = AdamW) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 6), nn.Linear(6, 3))
    optimizer = cls(model.parameters(), lr=0.01)
    step(model, optimizer)
    if bad is not None:
        optimizer.state[model[0].weight]["exp_avg_sq"][3, 2] = bad
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()


def policy(codec: Any) -> Policy:
    return Policy([Rule(role="embedding", exp_avg=BFloat16(), exp_avg_sq=codec)])


def refusal() -> Any:
    return pytest.raises(ValueError, match=r"0\.weight: its exp_avg_sq holds NaN or inf in 1 of 240 elements")


@every_codec
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_compress_refuses_them_and_changes_nothing(codec, bad):
    model, optimizer = trained(bad)
    before = copy.deepcopy(optimizer.state_dict())
    with refusal():
        compress(optimizer, model, policy(codec))
    assert type(optimizer) is AdamW
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert repr(optimizer.state_dict()["state"]) == repr(before["state"])


@every_codec
def test_a_plain_checkpoint_with_them_is_refused_and_changes_nothing(codec, tmp_path):
    _, plain = trained(math.inf)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    model, optimizer = trained()
    compress(optimizer, model, policy(codec))
    before = copy.deepcopy(optimizer.state_dict())
    with refusal():
        optimizer.load_state_dict(plain.state_dict())
    with refusal():
        restore(optimizer, tmp_path / "plain.pt")
    with refusal():
        convert_checkpoint(
            tmp_path / "plain.pt", tmp_path / "new.pt", to="compressed", policy=policy(codec), model=model
        )
    assert not (tmp_path / "new.pt").exists()
    assert_same(optimizer.state_dict(), before)


@every_codec
def test_assigned_ones_are_refused_before_the_step(codec):
    model, optimizer = trained()
    compress(optimizer, model, policy(codec))
    dense = torch.ones(40, 6)
    dense[3, 2] = math.nan
    optimizer.state[model[0].weight]["exp_avg_sq"] = dense
    before = model[0].weight.detach().clone()
    with refusal():
        step(model, optimizer)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("codec", APART, ids=str)
def test_codecs_that_keep_elements_apart_take_them(codec):
    model, optimizer = trained(math.inf)
    compress(optimizer, model, policy(codec))
    step(model, optimizer)
    assert model[0].weight.isfinite().all()


def test_other_optimizers_refuse_them_too():
    model, optimizer = trained(math.inf, NAdam)
    with refusal():
        compress(optimizer, model, Policy([Rule(role="embedding", second_moment=Quantized(block=16))]))
    assert type(optimizer) is NAdam


def on_rank(rank: int, world_size: int) -> list[str]:
    """What ranks meet of which one holds inf: at conversion, and in a step after it was assigned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 6), nn.Linear(6, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    moments = optimizer.state[model[0].weight]["exp_avg_sq"]
    good = moments.clone()
    if rank == 1:
        moments.to_local()[3, 2] = math.inf
    messages = []
    for codec in (RowWise(), Factored()):  # of the one ranks share nothing; all of the other layer's are shared
        rules = [*policy(codec).rules, Rule(name="1.weight", exp_avg=BFloat16(), exp_avg_sq=Factored())]
        try:
            compress(optimizer, model, Policy(rules))
        except ValueError as error:
            messages.append(f"{type(optimizer).__name__}: {error}")
    optimizer.state[model[0].weight]["exp_avg_sq"] = good
    compress(optimizer, model, policy(Factored()))
    optimizer.state[model[0].weight]["exp_avg_sq"] = moments
    try:
        step(model, optimizer)
    except ValueError as error:
        messages.append(str(error))
    optimizer.state[model[0].weight]["exp_avg_sq"] = good
    step(model, optimizer)
    return [*messages, str(bool(model[0].weight.full_tensor().isfinite().all()))]


@pytest.mark.distributed
def test_all_ranks_refuse_what_one_of_them_holds():
    without, holding = run_ranks(on_rank, 2)
    assert len(without) == len(holding) == 4
    for number in (0, 1):
        assert without[number].startswith("AdamW: 0.weight, 1.weight: refused on another rank, whose error says why")
        assert holding[number].startswith("AdamW: 0.weight: its exp_avg_sq holds NaN or inf in 1 of 120 elements")
    assert without[2].startswith("0.weight: refused on another rank")
    assert holding[2].startswith("0.weight: its exp_avg_sq holds")
    assert without[3] == holding[3] == "True"
