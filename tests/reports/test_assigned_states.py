"""Dense states that scripts write into ``optimizer.state[param]`` (Guitaricet/relora#10)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor import distribute_tensor
from torch.optim import AdamW, RMSprop

from lightning_sketch import BFloat16, Drop, Keep, Policy, Quantized, RowWise, Rule, compress, decompress, report
from tests.ranks import run_ranks
from tests.tiny import ADAMW, CODECS, EVERY, Tiny, assert_same, give_gradients, on_table, snapshot, train

ROWS = on_table(first_moment=BFloat16(), second_moment=RowWise())
CASE_AND_CODECS = pytest.mark.parametrize(("case", "codecs"), EVERY, ids=lambda x: str(x))


def _trained(case=ADAMW, policy=ROWS, steps=3):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = case.make(model.parameters())
    if policy is not None:
        compress(optimizer, model, policy)
    train(model, optimizer, range(steps), sparse=case.sparse)
    return model, optimizer


def _dense(case):
    """The table's state under the stock class."""
    model, optimizer = _trained(case, None, steps=4)
    return dict(optimizer.state[model.table.weight])


def _inexact(optimizer):
    return {state: error for state, error in report(optimizer).conversion_errors["table.weight"].items() if error}


@CASE_AND_CODECS
def test_a_whole_dense_state_is_taken_as_load_state_dict_takes_it(case, codecs):
    policy = on_table(**CODECS[codecs])
    model, optimizer = _trained(case, policy)
    other, loaded = copy.deepcopy(model), None
    loaded = compress(case.make(other.parameters()), other, policy)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][0] = copy.deepcopy(_dense(case))
    for group in checkpoint["param_groups"]:
        group["compression"] = None
    loaded.load_state_dict(checkpoint)
    optimizer.state[model.table.weight] = _dense(case)
    for one, own in ((model, optimizer), (other, loaded)):
        train(one, own, [9], sparse=case.sparse)
    assert_same(snapshot(model, optimizer), snapshot(other, loaded))
    assert _inexact(optimizer) == _inexact(loaded)


@CASE_AND_CODECS
def test_one_dense_state_replaces_that_state_and_no_other(case, codecs):
    policy = on_table(**CODECS[codecs])
    for name in _dense(case):
        if name == "step":
            continue
        model, optimizer = _trained(case, policy)
        before = snapshot(model, optimizer)
        optimizer.state[model.table.weight][name] = torch.zeros_like(model.table.weight)
        checkpoint = optimizer.state_dict()["state"][0]  # encodes
        assert set(checkpoint) == {key.removeprefix("table.weight.") for key in before if "table.weight." in key}
        for key, value in checkpoint.items():
            of_it = key == name or (key.startswith(f"{name}_") and not key.startswith(f"{name}_sq"))
            if not of_it:
                assert_same(value, before[f"table.weight.{key}"])
            elif not key.endswith("_scale"):
                assert not value.any()
                assert value.dtype == before[f"table.weight.{key}"].dtype


def test_both_moments_set_to_zeros_reset_both_and_leave_the_checkpoint_loadable():
    model, optimizer = _trained()
    state = optimizer.state[model.table.weight]
    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(model.table.weight) for _ in range(2))
    train(model, optimizer, [3])
    assert set(state) == {"step", "exp_avg", "exp_avg_sq_row", "exp_avg_sq_scale"}
    assert state["exp_avg"].dtype == torch.bfloat16
    squares = model.table.weight.grad.square().mean(dim=1) * (1 - 0.999)
    torch.testing.assert_close(state["exp_avg_sq_row"] * state["exp_avg_sq_scale"], squares)
    again, loaded = _trained()
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(dict(loaded.state[again.table.weight]), dict(state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_state_stored_by_element_comes_back_in_its_own_dtype(dtype):
    """Assigned, or cast by a trainer."""
    model, optimizer = _trained(policy=on_table(exp_avg=BFloat16(), exp_avg_sq=Keep()))
    state = optimizer.state[model.table.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = state[key].to(dtype)
    train(model, optimizer, [3])
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("steps", [None, 0, 7, 7.0, torch.tensor(7.0), torch.tensor(7)], ids=repr)
def test_an_assigned_state_may_count_in_any_form_or_not_at_all(steps):
    model, optimizer = _trained()
    expected = 2 if steps is None else int(steps) + 1
    dense = {"exp_avg": torch.zeros(30, 4), "exp_avg_sq": torch.zeros(30, 4)}
    optimizer.state[model.table.weight] = dense | ({} if steps is None else {"step": steps})
    train(model, optimizer, [3])
    assert optimizer.state[model.table.weight]["step"] == expected


def test_what_a_dropped_state_was_assigned_is_let_go_and_reported():
    model, optimizer = _trained(policy=on_table(first_moment=Drop(), second_moment=RowWise()))
    optimizer.state[model.table.weight]["exp_avg"] = torch.ones(30, 4)
    train(model, optimizer, [3])
    assert "exp_avg" not in optimizer.state[model.table.weight]
    assert report(optimizer).conversion_errors["table.weight"]["exp_avg"] == 1


REFUSED = {
    "shape": ({"exp_avg_sq": torch.zeros(31, 4)}, r"its exp_avg_sq .* \[31, 4\] .*; expected .* \[30, 4\]"),
    "a column": ({"exp_avg_sq": torch.zeros(30, 1)}, r"its exp_avg_sq .* \[30, 1\]"),
    "integers": ({"exp_avg": torch.zeros(30, 4, dtype=torch.int64)}, "its exp_avg .* int64"),
    "sparse": ({"exp_avg_sq": torch.zeros(30, 4).to_sparse(1)}, "its exp_avg_sq"),
    "a number": ({"exp_avg_sq": 0.0}, "its exp_avg_sq .* is 0.0; expected a dense tensor"),
    "None": ({"exp_avg": None}, "its exp_avg .* is missing"),
    "stored shape": ({"exp_avg_sq_row": torch.zeros(29)}, r"its exp_avg_sq_row .* \[29\] .*, expected .* \[30\]"),
    "NaN steps": ({"step": float("nan")}, "its step is nan"),
    "negative steps": ({"step": -1}, "its step is -1"),
    "no count": ({"step": "3"}, "its step is '3'"),
}


@pytest.mark.parametrize(("assigned", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("act", ["step", "state_dict", "decompress"])
def test_anything_else_is_refused_by_name_before_anything_moves(assigned, message, act):
    model, optimizer = _trained()
    optimizer.state[model.table.weight].update(assigned)
    give_gradients(model, 3)
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(ValueError, match=f"table.weight: {message}"):
        decompress(optimizer) if act == "decompress" else getattr(optimizer, act)()
    assert_same(dict(model.state_dict()), before)
    assert type(optimizer).__qualname__ == "CompressedAdamW"


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq_row", "exp_avg_sq_scale"])
def test_a_lost_entry_is_named_before_anything_moves(lost):
    model, optimizer = _trained()
    del optimizer.state[model.table.weight][lost]
    give_gradients(model, 3)
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(ValueError, match=f"table.weight: its {lost} .*reset_states"):
        optimizer.step()
    assert_same(dict(model.state_dict()), before)


def test_an_emptied_state_starts_afresh():
    for forget in (lambda states, param: states.pop(param), lambda states, param: states[param].clear()):
        model, optimizer = _trained()
        forget(optimizer.state, model.table.weight)
        train(model, optimizer, [3])
        assert optimizer.state[model.table.weight]["step"] == 1


def test_decompressing_takes_what_was_assigned():
    model, optimizer = _trained()
    assigned = torch.rand(30, 1).expand(30, 4).contiguous()
    optimizer.state[model.table.weight]["exp_avg_sq"] = assigned
    decompress(optimizer)
    torch.testing.assert_close(optimizer.state[model.table.weight]["exp_avg_sq"], assigned)


def test_a_wrapper_s_own_entries_stay_and_travel():
    """timm's Lookahead keeps its slow weights in the state of the optimizer that it wraps."""
    model, optimizer = _trained()
    slow = torch.rand(30, 4)
    optimizer.state[model.table.weight]["lookahead_slow_buff"] = slow
    train(model, optimizer, [3])
    assert optimizer.state[model.table.weight]["lookahead_slow_buff"] is slow
    other, loaded = _trained()
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(loaded.state[other.table.weight]["lookahead_slow_buff"], slow)


def test_a_momentum_buffer_beside_a_compressed_second_moment():
    model = Tiny()
    optimizer = compress(RMSprop(model.parameters(), momentum=0.9), model, ROWS)
    train(model, optimizer, range(2))
    optimizer.state[model.table.weight]["momentum_buffer"] = torch.zeros(30, 4)
    train(model, optimizer, [2])
    assert optimizer.state[model.table.weight]["momentum_buffer"].dtype == torch.bfloat16


def _shards(rank, world_size):
    """Dense states of a DTensor parameter: DTensors, whole tensors, and what has another placement."""
    mesh = init_device_mesh("cpu", (world_size,))
    rows = torch.arange(1.0, 22)[:, None].expand(21, 8).contiguous()
    found = []
    for make in (lambda: distribute_tensor(rows, mesh, [Split(0)]), rows.clone):
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.ones(21, 8), mesh, [Split(0)]))
        policy = Policy([Rule(exp_avg=BFloat16(), exp_avg_sq=RowWise())])
        optimizer = compress(AdamW(model.parameters()), model, policy)
        model.weight.grad = distribute_tensor(torch.zeros(21, 8), mesh, [Split(0)])
        optimizer.step()
        state = optimizer.state[model.weight]
        state["exp_avg_sq"], state["exp_avg"] = make(), make()
        optimizer.state_dict()
        found += [state["exp_avg_sq_row"] * state["exp_avg_sq_scale"], state["exp_avg"][:, 0].float()]
        state["exp_avg_sq"] = distribute_tensor(torch.zeros(21, 8), mesh, [Split(1)])
        with pytest.raises(ValueError, match="placements"):
            optimizer.step()
    return found


def test_every_rank_of_a_sharded_layer_takes_its_rows():
    parts = run_ranks(_shards, 2)
    for pieces in zip(*parts, strict=True):
        torch.testing.assert_close(torch.cat(pieces), torch.arange(1.0, 22))


@pytest.mark.parametrize("second", [BFloat16(), RowWise(), Quantized()], ids=repr)
def test_a_state_that_was_moved_to_another_device_is_refused_before_anything_changes(second):
    """A kernel would go by its address, and read or write memory that is not there."""
    model = nn.Linear(8, 4)
    optimizer = compress(torch.optim.AdamW(model.parameters()), model, Policy([Rule(name="weight", exp_avg_sq=second)]))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    key = next(key for key in state if key.startswith("exp_avg_sq") and not key.endswith("scale"))
    state[key] = state[key].to("meta")
    before = model.weight.detach().clone(), model.bias.detach().clone()
    with pytest.raises(ValueError, match=rf"weight: its {key} in optimizer.state is on meta, and the parameter on cpu"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, (model.weight, model.bias), strict=True))
