"""The converted optimizer behaves as torch.optim's: closures, hooks, scalers, flags, groups, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.optim import Adam, AdamW, Optimizer, RMSprop, SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_sketch import Policy, Rule, compress, decompress, report
from lightning_sketch.layers.record import LayerRecord
from tests.tiny import ADAM, ADAMW, CASES, EXACTLY, LOSSY, Tiny, assert_same, give_gradients, on_table, snapshot, train
from tests.torch_versions import adam_decouples

every_case = pytest.mark.parametrize("case", CASES, ids=str)
#: A policy with a function in it, which pickle cannot carry.
WITH_FUNCTION = Policy([Rule(match=lambda fqn, module, param: fqn == "table.weight", second_moment="BFloat16",
                             first_moment="BFloat16")])  # fmt: skip


@every_case
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(case):
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, LOSSY)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        give_gradients(model, 0, sparse=case.sparse)
        return torch.tensor(3.5)

    before = snapshot(model, optimizer)
    with torch.no_grad():
        assert optimizer.step(closure) == 3.5
    assert calls == [True]
    for name, param in model.named_parameters():
        assert not torch.equal(param, before[name])


def test_step_returns_none_without_a_closure():
    model = Tiny()
    assert compress(ADAM.make(model.parameters()), model, LOSSY).step() is None


@pytest.mark.parametrize("converted", ["before", "after"])
@every_case
def test_step_hooks_fire_once_in_order(case, converted):
    model, other = Tiny(), Tiny()
    optimizer = case.make(model.parameters())
    case.make(other.parameters()).step()  # torch hooks a class at the first instance; ours must stay out of it
    calls = []
    if converted == "before":
        compress(optimizer, model, LOSSY)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    if converted == "after":
        compress(optimizer, model, LOSSY)
    try:
        train(model, optimizer, [0], sparse=case.sparse)
        assert calls == ["global pre", "pre", "post", "global post"]
        train(model, decompress(optimizer), [1], sparse=case.sparse)
        assert calls == ["global pre", "pre", "post", "global post"] * 2
    finally:
        for handle in handles:
            handle.remove()


def test_step_hooks_fire_once_although_torch_compile_wraps_the_step_again(monkeypatch):
    model = Tiny()
    optimizer = SparseAdam(model.table.parameters())  # torch._dynamo, once imported, does this to SparseAdam
    monkeypatch.setattr(SparseAdam, "step", torch._dynamo.disable(SparseAdam.step))
    compress(optimizer, model, LOSSY)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    train(model.table, optimizer, [0], sparse=True)
    assert calls == ["pre"]


def test_a_pre_hook_sees_every_gradient_and_a_post_hook_finds_them_again():
    model = Tiny()
    optimizer = compress(ADAM.make(model.parameters()), model, LOSSY)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad for p in model.parameters()]))
    optimizer.register_step_post_hook(lambda *_: seen.append([p.grad for p in model.parameters()]))
    train(model, optimizer, [0])
    assert all(a is b is not None for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("converted", ["before", "after"])
def test_state_dict_hooks_fire_once_and_see_the_whole_dictionary(converted):
    model = Tiny()
    optimizer = ADAM.make(model.parameters())
    if converted == "before":
        compress(optimizer, model, LOSSY)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append(sorted(d["state"][0])))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append(sorted(d["state"][0])))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(sorted(o.state[model.table.weight])))
    if converted == "after":
        compress(optimizer, model, LOSSY)
    train(model, optimizer, [0])
    keys = sorted(optimizer.state[model.table.weight])
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", keys, keys, keys]


def test_a_load_hook_may_exchange_the_dictionary():
    model = Tiny()
    optimizer = compress(ADAM.make(model.parameters()), model, LOSSY)
    train(model, optimizer, [0])
    saved, states = copy.deepcopy(optimizer.state_dict()), snapshot(model, optimizer)
    train(model, optimizer, [1])
    optimizer.register_load_state_dict_pre_hook(lambda o, d: saved if "wrapped" in d else None)
    optimizer.load_state_dict({"wrapped": True})
    found = snapshot(model, optimizer)
    assert_same({k: v for k, v in found.items() if "weight." in k}, {k: v for k, v in states.items() if "weight." in k})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("converted_at", [0, 2])
def test_a_grad_scaler_s_gradients_are_unscaled_and_its_overflows_skipped(fused, converted_at):
    model = Tiny()
    unscaled = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AdamW(model.parameters(), lr=0.05, fused=fused)
    reference = compress(AdamW(unscaled.parameters(), lr=0.05), unscaled, EXACTLY)
    for step in range(5):
        if step == converted_at:
            compress(optimizer, model, EXACTLY)
        give_gradients(unscaled, step)
        reference.step()
        scaler.scale(torch.ones(()))  # creates the scale
        for position in (None, 0, 1):  # an overflow in the table, in a kept layer, and none
            give_gradients(model, step)
            before = snapshot(model, optimizer)
            scale = scaler.get_scale()
            for param in model.parameters():
                param.grad *= scale
            if position is not None:
                list(model.parameters())[position].grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            if position is not None:
                assert scaler.get_scale() == scale / 2
                assert_same(snapshot(model, optimizer), before)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, unscaled.get_parameter(name), rtol=1e-5, atol=1e-6)


@adam_decouples
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_decays_weights_as_its_group_says(decoupled):
    model = Tiny()
    plain = copy.deepcopy(model)
    kwargs = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": decoupled}
    optimizer, stock = Adam(model.parameters(), **kwargs), Adam(plain.parameters(), **kwargs)
    compress(optimizer, model, EXACTLY)
    train(model, optimizer, range(3))
    train(plain, stock, range(3))
    torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", ["amsgrad", "differentiable"])
def test_flags_that_compressed_layers_cannot_have_are_refused_by_name(flag):
    model = Tiny()
    message = f"{flag}=True is not supported for compressed layers, and table.weight is one"
    with pytest.raises(ValueError, match=message):
        compress(Adam(model.parameters(), **{flag: True}), model, LOSSY)

    optimizer = compress(Adam(model.parameters()), model, LOSSY)  # and where the flag comes later
    train(model, optimizer, [0])
    before = snapshot(model, optimizer)
    optimizer.param_groups[0][flag] = True
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, [1])
    assert_same(snapshot(model, optimizer), before)

    groups = [{"params": model.table.parameters()}, {"params": model.kept.parameters(), flag: True}]
    compress(Adam(groups), model, LOSSY)  # kept layers may have it


def test_amsgrad_works_on_for_kept_layers():
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizers = [
        Adam([{"params": m.table.parameters()}, {"params": m.kept.parameters(), "amsgrad": True}])
        for m in (model, plain)
    ]
    compress(optimizers[0], model, LOSSY)
    train(model, optimizers[0], range(3))
    train(plain, optimizers[1], range(3))
    assert "max_exp_avg_sq" in optimizers[0].state[model.kept.weight]
    assert_same(snapshot(model.kept, optimizers[0]), snapshot(plain.kept, optimizers[1]))


def test_groups_keep_their_own_hyperparameters():
    class TwoTables(Tiny):
        def __init__(self):
            super().__init__()
            self.second = nn.Embedding(20, 3)

    model = TwoTables()
    plain = copy.deepcopy(model)
    optimizers = [
        AdamW([
            {"params": m.table.parameters(), "lr": 0.3, "weight_decay": 0.0},
            {"params": m.kept.parameters(), "betas": (0.5, 0.6)},
            {"params": m.second.parameters(), "lr": 0.01, "weight_decay": 0.5, "betas": (0.1, 0.2), "maximize": True},
        ])
        for m in (model, plain)
    ]  # fmt: skip
    compress(optimizers[0], model, EXACTLY)
    train(model, optimizers[0], range(4))
    train(plain, optimizers[1], range(4))
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, plain.get_parameter(name), rtol=1e-5, atol=1e-6)


class Growing(Tiny):
    """Starts to train with some layers frozen, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.ModuleDict({"table": nn.Embedding(20, 3), "bias": nn.Linear(3, 3)})


@pytest.mark.parametrize("cls", [Adam, RMSprop])
def test_the_policy_decides_an_added_group(cls):
    model = Growing()
    optimizer = compress(cls([*model.table.parameters(), *model.kept.parameters()], lr=0.1), model, LOSSY)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": model.late.parameters(), "lr": 0.2})
    train(model, optimizer, range(2, 4))
    state = "exp_avg_sq" if cls is Adam else "square_avg"
    assert f"{state}_table" in optimizer.state[model.late.table.weight]
    assert state in optimizer.state[model.late.bias.weight]
    assert optimizer.param_groups[1]["lr"] == 0.2
    optimizer.load_state_dict(optimizer.state_dict())
    assert type(decompress(optimizer)) is cls
    train(model, optimizer, [4])


@pytest.mark.parametrize("params", [list, iter, lambda p: next(iter(p))], ids=["list", "iterator", "tensor"])
def test_an_added_group_takes_parameters_as_torch_does(params):
    model = Growing()
    optimizer = compress(Adam(model.kept.parameters()), model, LOSSY, allow_empty=True)
    optimizer.add_param_group({"params": params(model.late.table.parameters())})
    assert [LayerRecord.from_record(r).fqn for r in optimizer.param_groups[1]["compression"]] == ["late.table.weight"]


def test_named_parameters_may_be_added():
    model = Growing()
    optimizer = compress(Adam(model.kept.named_parameters("kept")), model, LOSSY, allow_empty=True)
    optimizer.add_param_group({"params": list(model.late.named_parameters("late"))})
    group = optimizer.param_groups[1]
    assert group["param_names"] == ["late.table.weight", "late.bias.weight", "late.bias.bias"]
    assert [r and LayerRecord.from_record(r).fqn for r in group["compression"]] == ["late.table.weight", None, None]


@pytest.mark.parametrize(
    ("added", "error", "message"),
    [
        (lambda m: [nn.Parameter(torch.ones(2, 3))], ValueError, r"parameter 0 of group 1 .* not a parameter of the"),
        (lambda m: [m.late.table.weight, m.late.table.weight], ValueError, "late.table.weight is in the optimizer twi"),
        (lambda m: [m.table.weight], ValueError, "some parameters appear in more than one parameter group"),
        (lambda m: set(m.late.parameters()), TypeError, "ordered collections"),
        (lambda m: [("late", m.late.table.weight)], ValueError, "cannot add param group with names"),
        (lambda m: [("late", m.late.table.weight), m.late.bias.bias], ValueError, "Some param names are missing"),
    ],
    ids=["foreign", "twice", "known", "set", "named", "half named"],
)
def test_a_rejected_group_changes_nothing(added, error, message):
    model = Growing()
    optimizer = compress(Adam([*model.table.parameters(), *model.kept.parameters()]), model, LOSSY)
    train(model, optimizer, [0])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": added(model)})
    assert_same(optimizer.state_dict(), before)
    train(model, optimizer, [1])


def test_an_added_group_is_decided_by_its_own_hyperparameters():
    model = Growing()
    optimizer = compress(RMSprop(model.table.parameters()), model, LOSSY)
    optimizer.add_param_group({"params": model.late.table.parameters(), "momentum": 0.9})
    train(model, optimizer, [0])
    assert "momentum_buffer_table" in optimizer.state[model.late.table.weight]
    assert "momentum_buffer_table" not in optimizer.state[model.table.weight]
    with pytest.raises(ValueError, match=r"amsgrad=True is not supported for compressed layers, and late.table.weight"):
        compress(Adam(model.table.parameters()), model, LOSSY).add_param_group(
            {"params": model.late.table.parameters(), "amsgrad": True}
        )


def test_groups_that_a_trainer_replaces_are_decided_anew():
    """Lightning's BaseFinetuning, when it resumes, assigns param_groups of its own."""
    model = Growing()
    optimizer = compress(Adam(model.table.parameters()), model, LOSSY)
    train(model, optimizer, [0])
    groups = [{k: v for k, v in optimizer.param_groups[0].items() if k != "compression"} for _ in range(2)]
    groups[1]["params"] = list(model.late.parameters())
    optimizer.param_groups = groups
    train(model, optimizer, [1])
    for table in (model.table, model.late.table):
        assert "exp_avg_table" in optimizer.state[table.weight]
    assert optimizer.state[model.table.weight]["step"] == 2
    assert "exp_avg" in optimizer.state[model.late.bias.bias]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("policy", [LOSSY, WITH_FUNCTION], ids=["plain", "with a function"])
@every_case
def test_a_copy_trains_on_like_the_original(case, policy, way):
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, policy)
    train(model, optimizer, range(2), sparse=case.sparse)
    pair = (model, optimizer)
    twin, its = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = snapshot(model, optimizer)
    train(twin, its, range(2, 4), sparse=case.sparse)
    assert_same(snapshot(model, optimizer), before)  # nothing is shared
    train(model, optimizer, range(2, 4), sparse=case.sparse)
    assert_same(snapshot(twin, its), snapshot(model, optimizer))
    assert type(decompress(its)) is case.cls


def test_an_unpickled_optimizer_asks_for_its_model_before_it_grows():
    model = Growing()
    optimizer = compress(Adam(model.table.parameters()), model, WITH_FUNCTION)
    twin, its = pickle.loads(pickle.dumps((model, optimizer)))
    with pytest.raises(RuntimeError, match="no longer knows its model"):
        its.add_param_group({"params": twin.kept.parameters()})
    compress(its, twin, WITH_FUNCTION)
    its.add_param_group({"params": twin.kept.parameters()})
    train(twin, its, [0])


@pytest.mark.parametrize("set_to_none", [True, False])
@every_case
def test_zero_grad_clears_compressed_and_kept_layers(case, set_to_none):
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, LOSSY)
    train(model, optimizer, [0], sparse=case.sparse)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in model.parameters():
        assert param.grad is None if set_to_none else not param.grad.to_dense().any()


def test_gradients_are_back_in_place_when_torch_s_own_step_fails():
    model = Tiny()
    optimizer = compress(ADAMW.make(model.parameters()), model, LOSSY)
    give_gradients(model, 0)
    grad = model.table.weight.grad
    del optimizer.param_groups[0]["foreach"]
    with pytest.raises(KeyError, match="foreach"):
        optimizer.step()
    assert model.table.weight.grad is grad


def test_a_step_without_any_gradient_does_nothing():
    for case in CASES:
        model = Tiny()
        optimizer = compress(case.make(model.parameters()), model, LOSSY)
        before = snapshot(model, optimizer)
        optimizer.step()
        assert_same(snapshot(model, optimizer), before)


def test_it_is_still_an_optimizer_with_its_own_name():
    model = Tiny()
    optimizer = compress(ADAMW.make(model.parameters()), model, on_table(second_moment="SM3"))
    assert isinstance(optimizer, Optimizer)
    assert repr(optimizer).startswith("AdamW (")
    assert not report(optimizer).skipped
