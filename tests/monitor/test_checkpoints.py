"""Checkpoints of layers whose codecs a monitor has replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import AdamW

import lightning_sketch
from lightning_sketch import (
    CountSketch,
    Drop,
    Keep,
    Monitor,
    Policy,
    RowWise,
    compress,
    decompress_state_dict,
    reset_states,
    resize_states,
    restore,
)
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.monitor import Threshold
from tests.tiny import Tiny, assert_same, on_table, snapshot, train

POLICIES = {
    "sketch": on_table(first_moment=CountSketch(compression=5), second_moment=CountSketch(compression=5)),
    "row means": on_table(first_moment=Drop(), second_moment=RowWise(compression=5)),
}
ALWAYS = Threshold(1e-9, 1e-9)


def changed(policy, on_drift, steps=2):
    """A model and optimizer whose table was changed by a monitor after the first of its steps."""
    model = Tiny()
    optimizer = compress(AdamW(model.parameters(), lr=0.05), model, policy)
    monitor = Monitor(every=1, on_drift=on_drift, threshold=ALWAYS)
    monitor.attach(optimizer)
    train(model, optimizer, range(1))
    monitor.detach(optimizer)
    train(model, optimizer, range(1, steps))
    return model, optimizer


def fresh(policy):
    model = Tiny()
    return model, compress(AdamW(model.parameters(), lr=0.05), model, policy)


def record_of(optimizer):
    return LayerRecord.from_record(optimizer.param_groups[0]["compression"][0])


@pytest.mark.parametrize("on_drift", ["widen", "keep"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_they_load_under_the_policy_that_the_run_began_with_and_train_on_in_the_same_bits(policy, on_drift, tmp_path):
    model, optimizer = changed(policy, on_drift)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for load in ("load_state_dict", "restore"):
        other, resumed = fresh(policy)
        other.load_state_dict(model.state_dict())
        if load == "restore":
            restore(resumed, tmp_path / "optimizer.pt")
        else:
            resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        assert record_of(resumed) == record_of(optimizer)
        assert record_of(resumed).as_decided().codecs == record_of(fresh(policy)[1]).codecs
        assert_same(snapshot(other, resumed), snapshot(model, optimizer))
        twin, live = copy.deepcopy((model, optimizer))
        train(twin, live, range(2, 4))
        train(other, resumed, range(2, 4))
        assert_same(snapshot(other, resumed), snapshot(twin, live))
        assert_same(resumed.compression.records, live.compression.records)


def test_one_of_before_the_change_loads_too_and_takes_it_back():
    policy = POLICIES["sketch"]
    model, optimizer = fresh(policy)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    _, wider = changed(policy, "widen")
    wider.load_state_dict(saved)
    assert record_of(wider) == record_of(optimizer)
    assert_same(wider.state_dict(), saved)


def test_under_another_policy_the_error_names_the_one_it_was_decided_by():
    _, optimizer = changed(POLICIES["sketch"], "keep")
    _, other = fresh(POLICIES["row means"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"CountSketch\(compression=5\)") as raised:
        other.load_state_dict(optimizer.state_dict())
    assert_same(other.state_dict(), before)
    printed = eval(str(raised.value).splitlines()[-1], vars(lightning_sketch))
    assert isinstance(printed, Policy)
    _, again = fresh(printed)
    again.load_state_dict(optimizer.state_dict())
    assert record_of(again).codecs["exp_avg"] == Keep()


def test_they_become_dense_and_a_dense_one_loads():
    model, optimizer = changed(POLICIES["sketch"], "widen")
    dense = decompress_state_dict(optimizer.state_dict())
    plain = AdamW(Tiny().parameters())
    plain.load_state_dict(dense)
    optimizer.load_state_dict(plain.state_dict())
    train(model, optimizer, range(1))


def test_a_changed_layer_can_be_reset_resized_and_copied():
    policy = POLICIES["sketch"]
    model, optimizer = changed(policy, "widen")
    model.table.weight = torch.nn.Parameter(torch.cat([model.table.weight.data, torch.zeros(2, 4)]))
    resize_states(optimizer, model)
    assert record_of(optimizer).decided is not None
    train(model, optimizer, range(1))
    reset_states(optimizer)
    train(model, optimizer, range(1))
    copied_model, copied = copy.deepcopy((model, optimizer))
    train(copied_model, copied, range(1))
    assert record_of(copied) == record_of(optimizer)
