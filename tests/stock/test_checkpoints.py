"""Checkpoints, copies and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from lightning_sketch import Policy, Rule, compress, decompress, decompress_state_dict, report, resize_states, restore
from tests.stock.optimizers import BF16, LION, MUON, NADAM, SCHEDULE_FREE, Case, Matrices
from tests.tiny import assert_same, snapshot, train

SOME = (NADAM, MUON, LION, SCHEDULE_FREE, Case(torch.optim.Adadelta), Case(torch.optim.Rprop))


def made(case, policy=BF16):
    torch.manual_seed(0)
    model = Matrices()
    optimizer = case.make(model.parameters())
    return model, optimizer if policy is None else compress(optimizer, model, policy)


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(case):
    model, optimizer = made(case)
    train(model, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed_model, resumed = made(case)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_same(snapshot(resumed_model, resumed), snapshot(model, optimizer))
    train(model, optimizer, range(3, 5))
    train(resumed_model, resumed, range(3, 5))
    assert_same(snapshot(resumed_model, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_plain_checkpoints_are_encoded(case, exactly):
    plain_model, plain = made(case, None)
    train(plain_model, plain, range(3))
    model, optimizer = made(case, exactly)
    model.load_state_dict(plain_model.state_dict())
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert max(report(optimizer).conversion_errors["table.weight"].values()) == 0
    train(plain_model, plain, range(3, 5))
    train(model, optimizer, range(3, 5))
    assert_same(dict(model.state_dict()), dict(plain_model.state_dict()))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_compressing_in_the_middle_and_back_changes_nothing(case, exactly):
    plain_model, plain = made(case, None)
    model, optimizer = made(case, None)
    for m, o in ((plain_model, plain), (model, optimizer)):
        train(m, o, range(2))
    compress(optimizer, model, exactly)
    for m, o in ((plain_model, plain), (model, optimizer)):
        train(m, o, range(2, 4))
    decompress(optimizer)
    assert type(optimizer) is case.cls
    assert_same(snapshot(model, optimizer), snapshot(plain_model, plain))
    for m, o in ((plain_model, plain), (model, optimizer)):
        train(m, o, range(4, 6))
    assert_same(snapshot(model, optimizer), snapshot(plain_model, plain))
    assert vars(optimizer).keys() == vars(plain).keys()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_checkpoint_made_plain_is_the_optimizer_s_own(case, exactly):
    plain_model, plain = made(case, None)
    model, optimizer = made(case, exactly)
    train(plain_model, plain, range(3))
    train(model, optimizer, range(3))
    found, expected = decompress_state_dict(optimizer.state_dict()), plain.state_dict()
    for key, entry in expected["state"].items():
        assert_same(dict(found["state"][key]), dict(entry), str(key))
    assert_same(found["param_groups"], expected["param_groups"])


@pytest.mark.parametrize("case", [x for x in SOME if x not in (LION, SCHEDULE_FREE)], ids=str)
def test_copies_go_their_own_way(case):
    """Those of pytorch_optimizer lose attributes when they are copied, and so do torch's copies of them."""
    model, optimizer = made(case)
    train(model, optimizer, range(2))
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, range(2, 4))
    for other_model, other in ((copied_model, copied), (pickled_model, pickled)):
        assert type(other) is type(optimizer)
        assert type(other).__name__ == case.cls.__name__
        train(other_model, other, range(2, 4))
        assert_same(snapshot(other_model, other), snapshot(model, optimizer))


def test_assigned_dense_states_are_encoded():
    model, optimizer = made(NADAM)
    train(model, optimizer, range(2))
    optimizer.state[model.table.weight]["exp_avg"] = torch.ones(30, 4)
    saved = optimizer.state_dict()["state"][0]
    assert saved["exp_avg"].dtype == torch.bfloat16
    assert (saved["exp_avg"] == 1).all()


def test_another_policy_is_refused_and_named():
    model, optimizer = made(Case(torch.optim.Adamax))
    train(model, optimizer, range(2))
    other_policy = Policy([Rule(name="hidden.*", first_moment="BFloat16")])
    other_model, other = made(Case(torch.optim.Adamax), other_policy)
    before = snapshot(other_model, other)
    expected = r"states=\{'exp_inf': BFloat16\(\)\}"
    with pytest.raises(
        ValueError, match=rf"table.weight: compressed in the checkpoint, kept .*\n.*\n(.*\n)*.*{expected}"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(other_model, other), before)


def test_a_checkpoint_of_another_optimizer_is_refused():
    model, optimizer = made(Case(torch.optim.Muon))
    train(model, optimizer, range(2))
    with pytest.raises(
        ValueError, match=r"table.weight: its codecs in the checkpoint is {.momentum_buffer.: .*}, here {.exp_avg.: "
    ):
        made(LION)[1].load_state_dict(optimizer.state_dict())


def test_moving_between_engines_is_refused_with_what_to_do(tmp_path):
    _model, optimizer = made(MUON)
    with pytest.raises(TypeError, match=r"restore\(\) cannot move the states of Muon, .* decompress_state_dict"):
        restore(optimizer, tmp_path / "nothing.pt")


def test_resizing_is_refused():
    model, optimizer = made(MUON)
    with pytest.raises(TypeError, match=r"resize_states\(\) cannot resize the states of Muon"):
        resize_states(optimizer, model)


def test_groups_that_are_added_are_compressed():
    model, optimizer = made(NADAM)
    other = torch.nn.Linear(3, 3)
    model.table.extra = other.weight
    optimizer.add_param_group({"params": [other.weight]})
    train(model, optimizer, range(2))
    assert optimizer.state[other.weight]["exp_avg"].dtype == torch.bfloat16
