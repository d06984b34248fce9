"""Checkpoints: resuming bit for bit, dense to compressed and back, and what is refused."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Adagrad, Adam, AdamW

from lightning_sketch import (
    BFloat16,
    CountSketch,
    Policy,
    RowWise,
    Rule,
    compress,
    decompress,
    decompress_state_dict,
    report,
)
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.classes import CompressedAdam
from tests.tiny import (
    ADAM,
    ADAMW,
    CASES,
    CODECS,
    EVERY,
    EXACTLY,
    LOSSY,
    Tiny,
    assert_same,
    on_table,
    snapshot,
    train,
)
from tests.torch_versions import adam_decouples

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def saved(thing):
    """Through a file, as plain PyTorch loads it."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def started(case, policy, steps=3, **kwargs):
    model = Tiny(**kwargs)
    optimizer = case.make(model.parameters())
    if policy is not None:
        compress(optimizer, model, policy)
    train(model, optimizer, range(steps), sparse=case.sparse)
    return model, optimizer


def assert_resumes(case, policy, **kwargs):
    model, optimizer = started(case, policy, **kwargs)
    checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    torch.manual_seed(1)
    resumed, again = started(case, policy, steps=0, **kwargs)
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))
    for m, o in ((model, optimizer), (resumed, again)):
        train(m, o, range(3, 6), sparse=case.sparse)
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codecs", CODECS)
def test_training_resumes_bit_for_bit_in_any_dtype(codecs, dtype):
    """In float32, under every codec and optimizer: tests/conformance/test_checkpoints.py."""
    assert_resumes(ADAMW, on_table(**CODECS[codecs]), dtype=dtype)


@every_case
def test_a_checkpoint_from_before_the_first_step_is_a_fresh_start(case):
    model, optimizer = started(case, LOSSY, steps=0)
    checkpoint = saved(optimizer.state_dict())
    again = compress(case.make(model.parameters()), model, LOSSY)
    again.load_state_dict(checkpoint)
    assert_same(snapshot(model, again), snapshot(model, optimizer))
    train(model, again, range(2), sparse=case.sparse)


@pytest.mark.parametrize("steps", [0, 2])
def test_loading_replaces_what_is_there(steps):
    model, optimizer = started(ADAM, LOSSY, steps=4)
    other, target = started(ADAM, LOSSY, steps=steps)
    target.load_state_dict(state_dict=optimizer.state_dict())  # by name, as DCP does
    other.load_state_dict(model.state_dict())
    assert_same(snapshot(other, target), snapshot(model, optimizer))


@pytest.mark.parametrize("policy", [LOSSY, None], ids=["compressed", "dense"])
def test_a_loaded_checkpoint_stays_the_caller_s(policy):
    model, optimizer = started(ADAM, policy)
    checkpoint = saved(optimizer.state_dict())
    before = copy.deepcopy(checkpoint)
    target = compress(ADAM.make(model.parameters()), model, LOSSY)
    target.load_state_dict(checkpoint)
    state = checkpoint["state"][0]
    mine = {t.data_ptr() for t in target.state[model.table.weight].values() if isinstance(t, torch.Tensor)}
    assert not mine & {t.data_ptr() for t in state.values() if isinstance(t, torch.Tensor)}
    for param in model.parameters():  # the kept ones are torch's, which shares them
        param.requires_grad_(param is model.table.weight)
        param.grad = torch.ones_like(param) if param.requires_grad else None
    target.step()
    assert_same(checkpoint, before)


@every_case
def test_a_dense_checkpoint_resumes_compressed(case):
    model, optimizer = started(case, None)
    checkpoint = saved(optimizer.state_dict())
    resumed, target = copy.deepcopy(model), None
    target = compress(case.make(resumed.parameters()), resumed, EXACTLY)
    target.load_state_dict(checkpoint)
    assert isinstance(target, CompressedOptimizer)
    assert set(report(target).conversion_errors["table.weight"].values()) == {0.0}
    train(resumed, target, range(3, 6), sparse=case.sparse)
    assert any(key.endswith("_table") for key in target.state[resumed.table.weight])
    train(model, optimizer, range(3, 6), sparse=case.sparse)
    for name, param in resumed.named_parameters():
        torch.testing.assert_close(param, model.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_encoding_a_dense_checkpoint_reports_its_errors():
    model, optimizer = started(ADAM, None)
    checkpoint = optimizer.state_dict()
    target = compress(ADAM.make(model.parameters()), model, on_table(first_moment=BFloat16(), second_moment=RowWise()))
    target.load_state_dict(checkpoint)
    errors = report(target).conversion_errors["table.weight"]
    assert 0 < errors["exp_avg"] < 0.01 < errors["exp_avg_sq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "codecs"), EVERY, ids=str)
def test_a_compressed_checkpoint_becomes_one_that_the_stock_class_loads(case, codecs, dtype):
    model, optimizer = started(case, on_table(**CODECS[codecs]), dtype=dtype)
    dense = decompress_state_dict(saved(optimizer.state_dict()), dtype)
    stock = case.make(model.parameters())
    stock.load_state_dict(dense)
    assert type(stock) is case.cls
    assert_same(snapshot(model, stock), snapshot(model, decompress(optimizer)))
    assert_same(stock.state_dict(), optimizer.state_dict())
    train(model, stock, [3], sparse=case.sparse)


def test_a_decompressed_checkpoint_shares_nothing_of_compressed_layers():
    model, optimizer = started(ADAM, LOSSY)
    before = snapshot(model, optimizer)
    for value in decompress_state_dict(optimizer.state_dict())["state"][0].values():
        value.add_(1)
    assert_same(snapshot(model, optimizer), before)


def test_a_dense_state_dict_has_nothing_to_decompress():
    with pytest.raises(ValueError, match="holds no compressed states; the plain optimizer can load it as it is"):
        decompress_state_dict(started(ADAM, None)[1].state_dict())


def test_a_dense_or_other_checkpoint_does_not_switch_compression_off():
    model, optimizer = started(ADAM, LOSSY)
    records = copy.deepcopy(optimizer.param_groups[0]["compression"])
    for source in (started(ADAM, None)[1], started(ADAM, Policy([Rule()]))[1]):
        optimizer.load_state_dict(source.state_dict())
        assert type(optimizer) is CompressedAdam
        assert optimizer.param_groups[0]["compression"] == records
        train(model, optimizer, [7])
        assert "exp_avg_sq_table" in optimizer.state[model.table.weight]


def test_hyperparameters_come_from_the_checkpoint():
    model, optimizer = started(ADAM, LOSSY)
    optimizer.param_groups[0] |= {"lr": 0.25, "betas": (0.1, 0.2)}
    target = compress(Adam(model.parameters()), model, LOSSY)
    target.load_state_dict(saved(optimizer.state_dict()))
    assert (target.param_groups[0]["lr"], target.param_groups[0]["betas"]) == (0.25, (0.1, 0.2))


def test_a_layer_that_had_no_gradient_yet_starts_afresh():
    model, optimizer = started(ADAM, LOSSY)
    source = compress(ADAM.make(model.parameters()), model, LOSSY)
    model.table.weight.grad = None
    source.step()
    optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state.get(model.table.weight)
    train(model, optimizer, [1])
    assert optimizer.state[model.table.weight]["step"] == 1


# -- what is refused -------------------------------------------------------------------------------------------------


SOURCES = {
    "policy": (lambda: started(ADAM, on_table(second_moment=RowWise()))[1], "its codecs in the checkpoint is"),
    "option": (lambda: started(ADAM, on_table(first_moment=CountSketch(3), second_moment=CountSketch(3)))[1], "codecs"),
    "seed": (lambda: started(ADAM, Policy(LOSSY.rules, seed=1))[1], "its hash seed in the checkpoint is"),
    "shape": (lambda: started(ADAM, LOSSY, rows=31)[1], r"its shape in the checkpoint is \[31, 4\], here \[30, 4\]"),
    "optimizer": (lambda: started(CASES[3], LOSSY)[1], "its codecs in the checkpoint is"),
    "dense of another optimizer": (lambda: started(CASES[5], None)[1], r"has no exp_avg .* holds \['momentum_buffer'"),
    "dense of another shape": (lambda: started(ADAM, None, rows=31)[1], r"exp_avg has shape \[31, 4\] .* \[30, 4\]"),
}


def damage(change):
    def make():
        optimizer = started(ADAM, LOSSY)[1]
        checkpoint = saved(optimizer.state_dict())
        records = checkpoint["param_groups"][0]["compression"]
        record = json.loads(records[0])
        change(record, checkpoint["state"][0])
        records[0] = json.dumps(record)
        return checkpoint

    return make


DAMAGED = {
    "version": (damage(lambda record, state: record.update(version=2)), "written by format version 2, this is 1"),
    "no version": (damage(lambda record, state: record.pop("version")), "written by format version None, this is 1"),
    "no table": (damage(lambda record, state: state.pop("exp_avg_table")), r"holds \[.*\], expected \['exp_avg_scale'"),
    "no step": (damage(lambda record, state: state.pop("step")), "expected"),
    "extra": (damage(lambda record, state: state.update(exp_avg=torch.zeros(30, 4))), "expected"),
    "table shape": (
        damage(lambda record, state: state.update(exp_avg_table=state["exp_avg_table"][:2])),
        r"exp_avg_table is float32 \[2, 5, 4\], expected float32 \[3, 5, 4\]",
    ),
    "table dtype": (
        damage(lambda record, state: state.update(exp_avg_sq_table=state["exp_avg_sq_table"].bfloat16())),
        r"exp_avg_sq_table is bfloat16 \[3, 5, 4\], expected float32 \[3, 5, 4\]",
    ),
    "table type": (damage(lambda record, state: state.update(exp_avg_table=None)), "exp_avg_table is NoneType, expect"),
    "scale": (
        damage(lambda record, state: state.update(exp_avg_scale=torch.zeros(()))),
        r"exp_avg_scale of table.weight is 0.0, expected one finite number above 0",
    ),
}


@pytest.mark.parametrize(("make", "message"), [*SOURCES.values(), *DAMAGED.values()], ids=[*SOURCES, *DAMAGED])
def test_a_checkpoint_that_does_not_fit_is_refused_by_layer_before_anything_changes(make, message):
    model, optimizer = started(ADAM, LOSSY)
    made = make()
    before, groups = snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    hooked = []
    optimizer.register_load_state_dict_post_hook(hooked.append)
    with pytest.raises(ValueError, match=rf"nothing was changed.\n  table.weight: .*{message}"):
        optimizer.load_state_dict(made if isinstance(made, dict) else made.state_dict())
    assert_same(snapshot(model, optimizer), before)
    assert_same(optimizer.state_dict()["param_groups"], groups)
    assert not hooked
    train(model, optimizer, [3])


def test_every_layer_that_does_not_fit_is_named():
    everything = Policy([Rule(first_moment=BFloat16(), second_moment=RowWise())])
    _, source = started(ADAM, everything)
    _, target = started(ADAM, Policy(everything.rules, seed=5))
    with pytest.raises(ValueError, match=r"table.weight: its hash seed .*\n.*kept.weight: .*\n.*kept.bias: "):
        target.load_state_dict(source.state_dict())


def test_a_layer_that_the_policy_keeps_cannot_be_loaded_compressed():
    _, optimizer = started(ADAM, LOSSY)
    _, target = started(ADAM, Policy([Rule(name="kept.*", second_moment=RowWise())]))
    with pytest.raises(ValueError, match=r"table.weight: compressed in the checkpoint, kept by the policy"):
        target.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("policy", [LOSSY, None], ids=["compressed", "dense"])
def test_other_groups_are_refused(policy):
    model, optimizer = started(ADAM, LOSSY)
    groups = [{"params": m.parameters()} for m in (model.table, model.kept)]
    source = Adam(groups)
    if policy is not None:
        compress(source, model, policy)
    with pytest.raises(ValueError, match=r"groups of \[1, 2\] parameters, the optimizer of \[3\]"):
        optimizer.load_state_dict(source.state_dict())


def test_a_state_dict_of_another_version_is_not_decompressed():
    checkpoint, _ = DAMAGED["version"]
    with pytest.raises(ValueError, match=r"table.weight: written by format version 2, this is 1"):
        decompress_state_dict(checkpoint())


# -- torch.distributed.checkpoint, in one process --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")  # DCP in one process says so
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.sparse], ids=str)
def test_dcp_saves_and_restores_it(case, flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = started(case, LOSSY)
    optimizer.zero_grad()
    dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=tmp_path)

    resumed, again = started(case, LOSSY, steps=0)
    template = get_optimizer_state_dict(resumed, again, options=options)
    dcp.load(template, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed, again, template, options=options)
    resumed.load_state_dict(model.state_dict())
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))
    for m, o in ((model, optimizer), (resumed, again)):
        train(m, o, range(3, 6))
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))


def test_dcp_and_a_sparse_adam_whose_layers_are_all_compressed():
    """DCP makes a step with dense zero gradients, which torch's SparseAdam refuses."""
    model = nn.Embedding(30, 4, sparse=True)
    optimizer = compress(CASES[2].make(model.parameters()), model, LOSSY)
    train(model, optimizer, range(3), sparse=True)
    optimizer.zero_grad()
    checkpoint = saved(get_optimizer_state_dict(model, optimizer))
    again = compress(CASES[2].make(model.parameters()), model, LOSSY)
    set_optimizer_state_dict(model, again, checkpoint)
    assert_same(snapshot(model, again), snapshot(model, optimizer))


def test_adagrad_s_initial_value_is_not_lost():
    model = Tiny()
    optimizer = compress(Adagrad(model.parameters(), initial_accumulator_value=0.5), model, on_table(sum=RowWise()))
    assert (decompress_state_dict(optimizer.state_dict())["state"][0]["sum"] == 0.5).all()
    assert (decompress(optimizer).state[model.table.weight]["sum"] == 0.5).all()


@adam_decouples
def test_adamw_and_adam_checkpoints_are_the_same_to_torch_and_to_us():
    _, optimizer = started(ADAM, LOSSY)
    model = Tiny()
    target = compress(AdamW(model.parameters()), model, LOSSY)
    target.load_state_dict(optimizer.state_dict())
    assert target.param_groups[0]["decoupled_weight_decay"] is True  # torch's AdamW insists
