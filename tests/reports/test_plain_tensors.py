"""Plain tensors beside the model's parameters, as CLIP's temperature and SAC's log_alpha, are torch's to step."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from lightning_sketch import Policy, Rule, compress, decompress, plan, report, resize_states
from tests.tiny import CASES, Tiny, assert_same, give_gradients, on_table

POLICY = on_table(first_moment="BFloat16", second_moment="RowWise")
FOR_SGD = on_table(first_moment="BFloat16")
DENSE = [case for case in CASES if not case.sparse]


def tensors():
    """A temperature and a matrix."""
    return [torch.tensor(0.07, requires_grad=True), torch.ones(3, 4, requires_grad=True)]


def policy_of(case):
    return FOR_SGD if case.cls.__name__ == "SGD" else POLICY


def step(model, plain, optimizer, number):
    give_gradients(model, number)
    for i, tensor in enumerate(plain):
        tensor.grad = torch.full_like(tensor, 0.1 * (number + i + 1))
    optimizer.step()


@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize("own_group", [False, True])
def test_torch_steps_them_as_without_compression(case, own_group):
    found = []
    for compressed in (False, True):
        torch.manual_seed(0)
        model, plain = Tiny(), tensors()
        groups = [{"params": [*model.parameters()]}, {"params": plain, "lr": 0.5}]
        optimizer = case.make(groups if own_group else [*plain, *model.parameters()])
        if compressed:
            compress(optimizer, model, policy_of(case))
            assert [layer.fqn for _, layer, _ in optimizer.compressed_layers()] == ["table.weight"]
        for number in range(3):
            step(model, plain, optimizer, number)
        found.append({"plain": [p.detach() for p in plain], "states": [dict(optimizer.state[p]) for p in plain]})
    assert_same(*found)


def test_the_plan_and_the_report_count_them():
    model, plain = Tiny(), tensors()
    optimizer = AdamW([*model.parameters(), *plain])
    made = plan(model, optimizer, POLICY)
    assert [x.layer.fqn for x in made.layers][-2:] == ["group 0 parameter 3", "group 0 parameter 4"]
    assert [x.roles for x in made.layers][-2:] == [("other",), ("hidden",)]
    assert [x.record for x in made.layers][-2:] == [None, None]
    before = report(optimizer).parameters
    compress(optimizer, model, POLICY)
    step(model, plain, optimizer, 0)
    assert report(optimizer).parameters == before
    counters = sum(state["step"].nbytes for state in optimizer.state.values())
    assert made.bytes_after == report(optimizer).state - counters


def test_checkpoints_hold_them():
    model, plain = Tiny(), tensors()
    optimizer = compress(AdamW([*plain, *model.parameters()]), model, POLICY)
    step(model, plain, optimizer, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = compress(AdamW([*tensors(), *model.parameters()]), model, POLICY)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(fresh.state_dict(), optimizer.state_dict())


def test_plain_checkpoints_load_and_decompressed_optimizers_go_on():
    model, plain = Tiny(), tensors()
    stock = AdamW([*plain, *model.parameters()])
    step(model, plain, stock, 0)
    optimizer = compress(AdamW([*plain, *model.parameters()]), model, POLICY)
    optimizer.load_state_dict(stock.state_dict())
    step(model, plain, optimizer, 1)
    decompress(optimizer)
    assert type(optimizer) is AdamW
    step(model, plain, optimizer, 2)
    assert [float(optimizer.state[p]["step"]) for p in [*plain, *model.parameters()]] == [3.0] * 5
    compress(optimizer, model, POLICY)
    step(model, plain, optimizer, 3)


def test_in_the_middle_of_training():
    model, plain = Tiny(), tensors()
    optimizer = AdamW([*plain, *model.parameters()])
    step(model, plain, optimizer, 0)
    kept = copy.deepcopy([dict(optimizer.state[p]) for p in plain])
    compress(optimizer, model, POLICY)
    assert_same([dict(optimizer.state[p]) for p in plain], kept)


def test_an_added_group():
    model, plain = Tiny(), tensors()
    optimizer = compress(AdamW(model.parameters()), model, POLICY)
    optimizer.add_param_group({"params": plain, "lr": 0.5})
    step(model, plain, optimizer, 0)
    assert float(plain[0].detach()) < 0.07
    assert optimizer.state_dict()["param_groups"][1]["compression"] == [None, None]


def test_a_table_beside_them_is_resized():
    model, plain = Tiny(), tensors()
    optimizer = compress(AdamW([*model.parameters(), *plain]), model, POLICY)
    step(model, plain, optimizer, 0)
    rows, dim = model.table.weight.shape
    model.table.weight = nn.Parameter(torch.randn(rows + 3, dim))
    before = [copy.deepcopy(optimizer.state[tensor]) for tensor in plain]
    resize_states(optimizer, model)
    for tensor, state in zip(plain, before, strict=True):
        assert_same(dict(optimizer.state[tensor]), state)
    step(model, plain, optimizer, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_and_pickles_know_them(copied):
    model, plain = Tiny(), tensors()
    optimizer = compress(AdamW([*model.parameters(), *plain]), model, POLICY)
    step(model, plain, optimizer, 0)
    model2, plain2, optimizer2 = copied((model, plain, optimizer))
    for each in ((model, plain, optimizer), (model2, plain2, optimizer2)):
        step(*each, 1)
    assert_same([p.detach() for p in plain2], [p.detach() for p in plain])
    assert_same(optimizer2.state_dict(), optimizer.state_dict())


EVERYTHING = Policy([Rule(second_moment="BFloat16")])


@pytest.mark.parametrize("policy", [EVERYTHING, Policy([Rule(role="hidden", first_moment="BFloat16")])])
def test_those_that_a_rule_would_compress_are_refused(policy):
    model = Tiny()
    optimizer = AdamW([{"params": model.parameters()}, {"params": tensors()[1:]}])
    message = (
        r"parameter 0 of group 1 \(shape \[3, 4\]\) is a plain tensor and no parameter of the model, and policy "
        r"rule 1 \(.*\) would compress it: register it in the model"
    )
    with pytest.raises(ValueError, match=message) as raised:
        compress(optimizer, model, policy)
    assert type(optimizer) is AdamW
    assert "DeepSpeed" not in str(raised.value)
    converted = compress(AdamW(model.parameters()), model, policy)
    with pytest.raises(ValueError, match=message):
        converted.add_param_group({"params": tensors()[1:]})
    assert len(converted.param_groups) == 1


def test_a_rule_that_keeps_lets_them_pass():
    model, plain = Tiny(), tensors()
    policy = Policy([Rule(name="group *"), Rule(second_moment="BFloat16")])
    model.register_parameter("group scale", nn.Parameter(torch.ones(())))  # a rule must decide something of the model
    optimizer = compress(AdamW([*model.parameters(), *plain]), model, policy)
    step(model, plain, optimizer, 0)
    assert {"exp_avg", "exp_avg_sq", "step"} == set(optimizer.state[plain[1]])


def test_parameters_of_another_module_are_refused():
    model, other = Tiny(), nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"parameter 3 of group 0 \(shape \[3, 2\]\) is not a parameter of the model.*M"
    ):
        compress(AdamW([*model.parameters(), *other.parameters()]), model, POLICY)
    both = nn.ModuleList([model, other])
    compress(AdamW(both.parameters()), both, POLICY)


def test_an_optimizer_of_plain_tensors_alone_is_refused():
    with pytest.raises(
        ValueError, match=r"holds no parameters of the model, but plain tensors only.*nothing to comp"
    ) as e:
        compress(Adam(tensors()), Tiny(), POLICY)
    assert "DeepSpeed" not in str(e.value)


def test_a_tensor_put_in_place_of_others_is_refused():
    model, plain = Tiny(), tensors()
    optimizer = compress(AdamW([*model.parameters(), *plain]), model, POLICY)
    optimizer.param_groups[0]["params"].append(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="a group of 5 parameters was compressed, and now holds 6"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = [torch.ones(2, requires_grad=True)]
    with pytest.raises(RuntimeError, match=r"a tensor of shape \[2\] took the place of the optimizer's parameters"):
        optimizer.step()


def test_a_model_whose_parameters_were_replaced_is_noticed_beside_them():
    model, plain = Tiny(), tensors()
    optimizer = compress(AdamW([*model.parameters(), *plain]), model, POLICY)
    for module in (model.table, model.kept):
        module.weight = nn.Parameter(module.weight.detach().clone())
    model.kept.bias = nn.Parameter(model.kept.bias.detach().clone())
    with pytest.raises(RuntimeError, match="none of the optimizer's parameters is the model's any more"):
        step(model, plain, optimizer, 0)
