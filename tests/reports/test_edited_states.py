"""States that scripts zero in place, compute from parameters or set before a step (Guitaricet/relora#10)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import Adagrad, AdamW, RMSprop

from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress, decompress
from tests.tiny import CODECS, EVERY, Tiny, on_table, snapshot, train

ROWS = on_table(first_moment=BFloat16(), second_moment=RowWise())


def _trained(policy=ROWS, case=None):
    model = Tiny()
    optimizer = AdamW(model.parameters(), lr=0.05) if case is None else case.make(model.parameters())
    if policy is not None:
        compress(optimizer, model, policy)
    train(model, optimizer, range(3), sparse=case is not None and case.sparse)
    return model, optimizer


def test_an_entry_traded_for_a_dense_state_is_noticed():
    """As many entries as before, though other ones."""
    for traded in ("step", "of a wrapper"):
        model, optimizer = _trained()
        state = optimizer.state[model.table.weight]
        state.setdefault(traded, None)
        train(model, optimizer, [3])
        del state[traded]
        state["exp_avg_sq"] = torch.zeros(30, 4)
        train(model, optimizer, [4])
        assert set(state) == {"step", "exp_avg", "exp_avg_sq_row", "exp_avg_sq_scale"}
        squares = model.table.weight.grad.square().mean(dim=1) * (1 - 0.999)
        torch.testing.assert_close(state["exp_avg_sq_row"] * state["exp_avg_sq_scale"], squares)


@pytest.mark.parametrize("act", ["step", "state_dict", "decompress", "compress"])
def test_a_dense_state_that_asks_for_gradients_is_encoded_without(act):
    model, optimizer = _trained(None if act == "compress" else ROWS)
    state = optimizer.state[model.table.weight]
    state["exp_avg"], state["exp_avg_sq"] = model.table.weight * 0.5, model.table.weight.square()
    if act == "step":
        train(model, optimizer, [3])
    elif act == "state_dict":
        optimizer.state_dict()
    elif act == "decompress":
        decompress(optimizer)
    else:
        compress(optimizer, model, ROWS)
    state = optimizer.state[model.table.weight]
    assert not any(state[key].requires_grad for key in state if key != "exp_avg" or act != "decompress")


@pytest.mark.parametrize(("case", "codecs"), EVERY, ids=str)
def test_states_zeroed_in_place_are_forgotten_in_steps_and_in_checkpoints(case, codecs):
    """Scales, too, are zeroed then."""
    policy = on_table(**CODECS[codecs])
    found = []
    for saved in (False, True):
        torch.manual_seed(0)
        model, optimizer = _trained(policy, case)
        for value in optimizer.state[model.table.weight].values():
            value.zero_()
        if saved:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, [3, 4], sparse=case.sparse)
        assert all(torch.as_tensor(value).isfinite().all() for value in snapshot(model, optimizer).values())
        found.append(snapshot(model, decompress(optimizer)))
    for key, value in found[0].items():  # a stored state and its scale are other ones, their product is the same
        torch.testing.assert_close(found[1][key], value, msg=lambda m, key=key: f"{key}: {m}")


def test_moments_whose_count_was_set_to_zero_are_encoded():
    model, optimizer = _trained(None)
    state = optimizer.state[model.table.weight]
    state["step"].zero_()
    moment = state["exp_avg"].bfloat16()
    compress(optimizer, model, on_table(first_moment=BFloat16(stochastic=False), second_moment=RowWise()))
    assert torch.equal(optimizer.state[model.table.weight]["exp_avg"], moment)
    assert optimizer.state[model.table.weight]["step"] == 0


def test_a_sum_that_was_set_before_the_first_step_is_encoded():
    model = Tiny()
    optimizer = Adagrad(model.parameters(), initial_accumulator_value=0.5)
    optimizer.state[model.table.weight]["sum"].fill_(3.0)
    compress(optimizer, model, Policy([Rule(role="embedding", second_moment=RowWise())]))
    decompress(optimizer)
    assert torch.equal(optimizer.state[model.table.weight]["sum"], torch.full((30, 4), 3.0))


@pytest.mark.parametrize("codecs", CODECS)
def test_a_sum_below_its_initial_value_leaves_the_rows_that_share_its_buckets_finite(codecs):
    """Zeros are the usual way to reset it."""
    model = Tiny()
    optimizer = Adagrad(model.parameters(), initial_accumulator_value=0.5)
    compress(optimizer, model, on_table(**CODECS[codecs]))
    optimizer.state[model.table.weight]["sum"] = torch.zeros(30, 4)
    train(model, optimizer, range(2), sparse=True)
    assert model.table.weight.isfinite().all()
    optimizer.state[model.table.weight]["sum"] = torch.zeros(30, 4)
    decompress(optimizer)
    assert not optimizer.state[model.table.weight]["sum"].any()


def test_conversions_leave_a_wrapper_s_entries_alone():
    """timm's Lookahead keeps its slow weights in the state of the optimizer that it wraps."""
    model, optimizer = _trained(None)
    slow = torch.rand(30, 4)
    optimizer.state[model.table.weight]["lookahead_slow_buff"] = slow
    for convert in (lambda: compress(optimizer, model, ROWS), lambda: decompress(optimizer)):
        convert()
        assert optimizer.state[model.table.weight]["lookahead_slow_buff"] is slow


def test_a_momentum_buffer_that_is_switched_off_outlives_conversions():
    model = Tiny()
    optimizer = RMSprop(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, range(2))
    buffer = optimizer.state[model.table.weight]["momentum_buffer"].clone()
    optimizer.param_groups[0]["momentum"] = 0
    compress(optimizer, model, ROWS)
    decompress(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    compress(optimizer, model, ROWS)
    torch.testing.assert_close(
        optimizer.state[model.table.weight]["momentum_buffer"].float(), buffer, rtol=0.01, atol=0
    )
    train(model, optimizer, [2])
