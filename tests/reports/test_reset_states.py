"""`reset_states`: training goes on as from a first step (Guitaricet/relora#10)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor import distribute_tensor
from torch.optim import Adagrad, AdamW

from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress, reset_states
from tests.ranks import run_ranks
from tests.tiny import ADAMW, CODECS, EVERY, LOSSY, Tiny, assert_same, snapshot, train


def _trained(case=ADAMW, policy=LOSSY):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, policy)
    train(model, optimizer, range(3), sparse=case.sparse)
    return model, optimizer


@pytest.mark.parametrize(("case", "codecs"), EVERY, ids=str)
def test_after_a_reset_training_goes_on_as_with_a_new_optimizer(case, codecs):
    policy = Policy([Rule(role="embedding", **CODECS[codecs])])
    model, optimizer = _trained(case, policy)
    other = copy.deepcopy(model)
    new = compress(case.make(other.parameters()), other, policy)
    assert reset_states(optimizer) == ["table.weight", "kept.weight", "kept.bias"]
    for step in (3, 4):
        train(model, optimizer, [step], sparse=case.sparse)
        train(other, new, [step], sparse=case.sparse)
        assert_same(snapshot(model, optimizer), snapshot(other, new))


def test_an_initial_accumulator_value_is_there_again():
    model = Tiny()
    optimizer = compress(Adagrad(model.parameters(), initial_accumulator_value=0.5), model, LOSSY)
    fresh = snapshot(model, optimizer)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2))
    held = optimizer.state_dict()
    before = copy.deepcopy(held)
    reset_states(optimizer)
    assert_same({k: v for k, v in snapshot(model, optimizer).items() if k.count(".") > 1},
                {k: v for k, v in fresh.items() if k.count(".") > 1})  # fmt: skip
    assert_same(held, before)  # a checkpoint that was taken stays as it is
    assert_same(copy.deepcopy(optimizer.state_dict()), checkpoint)


@pytest.mark.parametrize(
    "layers", ["kept.*", ["kept.weight", "kept.bias"], "re:^kept", ("*bias", "*t.weight")], ids=str
)
def test_only_the_layers_that_are_named_are_reset(layers):
    model, optimizer = _trained()
    before = snapshot(model, optimizer)
    assert reset_states(optimizer, layers) == ["kept.weight", "kept.bias"]
    assert_same(snapshot(model, optimizer), {k: v for k, v in before.items() if "kept" not in k or k.count(".") == 1})
    train(model, optimizer, [3])
    assert optimizer.state[model.kept.weight]["step"] == 1
    assert optimizer.state[model.table.weight]["step"] == 4


@pytest.mark.parametrize("layers", [["tabel.weight"], ["kept.*", "tabel.weight"]], ids=str)
def test_an_unknown_layer_is_an_error_that_names_the_nearest(layers):
    model, optimizer = _trained()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"'tabel.weight' matches no parameter .* nearest is 'table.weight'"):
        reset_states(optimizer, layers)
    assert_same(snapshot(model, optimizer), before)


def test_a_plain_optimizer_is_told_of_torch_s_own_way():
    with pytest.raises(TypeError, match=r"got AdamW; of a plain one, optimizer.state.clear\(\)"):
        reset_states(AdamW(Tiny().parameters()))


def test_a_trainer_s_wrapper_is_unwrapped():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from lightning.pytorch.core.optimizer import LightningOptimizer

    try:
        for wrap in (Accelerator(cpu=True).prepare, LightningOptimizer):
            _, optimizer = _trained()
            reset_states(wrap(optimizer))
            assert not optimizer.state
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _reset_shards(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.ones(21, 8), mesh, [Split(0)]))
    policy = Policy([Rule(exp_avg=BFloat16(), exp_avg_sq=RowWise())])
    optimizer = compress(AdamW(model.parameters()), model, policy)
    counts = []
    for step in range(4):
        if step == 2:
            reset_states(optimizer, "weight")
        model.weight.grad = distribute_tensor(torch.ones(21, 8), mesh, [Split(0)])
        optimizer.step()
        counts.append(float(optimizer.state[model.weight]["step"]))
    return counts


def test_every_rank_resets_its_own_shard():
    assert run_ranks(_reset_shards, 2) == [[1, 2, 1, 2]] * 2
