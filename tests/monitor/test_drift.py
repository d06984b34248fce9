"""What happens to layers whose states have drifted."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_sketch import BFloat16, CountSketch, Drop, Keep, Monitor, Policy, RowWise, Rule, compress, report
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.monitor import LayerFigures, StateDrift, Threshold

SMALL = CountSketch(compression=40)
#: Which a sketch of 40 rows to a bucket is past.
STRICT = Threshold(1.0, 1.0)


def make(monitor=None, **codecs):
    """A table of 400 rows, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 4))
    policy = Policy([Rule(role="embedding", **codecs or {"exp_avg": SMALL, "exp_avg_sq": SMALL})])
    return model, compress(AdamW(model.parameters(), lr=0.01, betas=(0.5, 0.9)), model, policy, monitor=monitor)


def train(model, optimizer, steps):
    for step in range(steps):
        model[0].weight.grad = torch.randn(400, 4, generator=torch.Generator().manual_seed(step)) + 1
        optimizer.step()


def codecs_of(optimizer):
    return LayerRecord.from_record(optimizer.param_groups[0]["compression"][0]).codecs


def test_raise_names_the_layer_and_its_figures_after_the_step_was_made():
    model, optimizer = make(Monitor(every=3, on_drift="raise", threshold=STRICT))
    train(model, optimizer, 2)
    with pytest.raises(StateDrift, match=r"0\.weight: .*exp_avg_sq error \d+\.?\d* \(at most 1\)"):
        train(model, optimizer, 1)
    assert int(optimizer.state[model[0].weight]["step"]) == 3


def test_warn_says_so_once_and_log_for_information(caplog):
    model, optimizer = make(Monitor(every=2, on_drift="warn", threshold=STRICT))
    train(model, optimizer, 6)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.getMessage().startswith("0.weight: compressed states have drifted: ")
    caplog.clear()
    model, optimizer = make(Monitor(every=2, threshold=STRICT))
    train(model, optimizer, 6)
    assert not caplog.records


def test_nothing_happens_to_layers_within_the_threshold(caplog):
    model, optimizer = make(Monitor(every=1, on_drift="raise"), exp_avg=BFloat16(), exp_avg_sq=RowWise())
    train(model, optimizer, 5)
    assert codecs_of(optimizer) == {"exp_avg": BFloat16(), "exp_avg_sq": RowWise()}
    assert not caplog.records


def test_widen_doubles_the_sketches_until_the_figures_are_within_it(caplog):
    monitor = Monitor(every=1, on_drift="widen", threshold=STRICT)
    model, optimizer = make(monitor)
    sizes = []
    for _ in range(12):
        train(model, optimizer, 1)
        sizes.append(optimizer.state[model[0].weight]["exp_avg_sq_table"].shape[:2])
    assert sizes[:6] == [(3, 8), (3, 16), (3, 32), (3, 64), (3, 128), (1, 400)]
    assert sizes[-1] == (1, 400)
    assert "from now on exp_avg in CountSketch(compression=" in caplog.records[0].getMessage()
    train(model, optimizer, 100)  # what was mixed up decays
    (figures,) = monitor.by_layer().values()
    assert all(error < 0.1 for error in figures.errors.values())


def test_row_means_in_a_sketch_are_widened_and_a_dropped_moment_stays_dropped():
    monitor = Monitor(every=1, on_drift="widen", threshold=STRICT)
    model, optimizer = make(monitor, exp_avg=Drop(), exp_avg_sq=RowWise(compression=40))
    train(model, optimizer, 8)
    assert codecs_of(optimizer) == {"exp_avg": Drop(), "exp_avg_sq": RowWise()}
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg_sq_row", "exp_avg_sq_scale"}


def test_keep_decodes_the_states_into_dense_ones_and_training_goes_on():
    monitor = Monitor(every=2, on_drift="keep", threshold=STRICT)
    model, optimizer = make(monitor, exp_avg=Drop(), exp_avg_sq=SMALL)
    train(model, optimizer, 2)
    state = optimizer.state[model[0].weight]
    assert set(state) == {"step", "exp_avg_sq"}
    assert codecs_of(optimizer) == {"exp_avg": Drop(), "exp_avg_sq": Keep()}
    assert report(optimizer).state_by_codec["Keep"] >= 400 * 4 * 4
    train(model, optimizer, 100)
    (figures,) = monitor.by_layer().values()
    assert figures.errors["exp_avg_sq"] < 0.1
    assert not figures.buckets_used


def test_where_nothing_can_be_widened_it_says_so(caplog):
    model, optimizer = make(
        Monitor(every=1, on_drift="widen", threshold=Threshold(second_moment=1e-6)), exp_avg_sq=RowWise()
    )
    train(model, optimizer, 3)
    (said,) = caplog.records
    assert 'nothing is left to be done by "widen"' in said.getMessage()


def figures(errors=None, cosine=1.0, norm_ratio=1.0):
    signed = {"exp_avg": True, "exp_avg_sq": False}
    return LayerFigures(errors or {}, cosine, norm_ratio, buckets_used={}, left_out=0, signed=signed)


def test_what_is_past_a_threshold():
    both = figures({"exp_avg": 0.1, "exp_avg_sq": 0.1}, cosine=0.9)
    assert not Threshold().moments_past(both) + Threshold().update_past(both)
    assert Threshold(first_moment=0.05).moments_past(both) == ["exp_avg error 0.1 (at most 0.05)"]
    assert Threshold(second_moment=0.05).moments_past(both) == ["exp_avg_sq error 0.1 (at most 0.05)"]
    assert Threshold(cosine=0.95).update_past(both) == ["update cosine 0.9 (at least 0.95)"]
    for ratio in (0.2, 5.0):
        assert Threshold().update_past(figures(norm_ratio=ratio)) == [f"update norm ratio {ratio:g} (0.25 to 4)"]
    assert Threshold().moments_past(figures({"exp_avg": float("nan")}))
    assert not Threshold().update_past(figures(cosine=None, norm_ratio=None))


def test_one_update_that_is_past_it_is_nothing_and_two_in_a_row_are(caplog):
    threshold = Threshold(first_moment=1e9, second_moment=1e9, cosine=0.999)
    model, optimizer = make(Monitor(every=1, on_drift="warn", threshold=threshold))
    train(model, optimizer, 1)
    assert not caplog.records
    train(model, optimizer, 1)
    assert "update cosine" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, r"Monitor\(rows=0\)"),
        ({"every": 0}, r"Monitor\(every=0\)"),
        ({"on_drift": "stop"}, "must be one of log, warn, raise, widen, keep"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Monitor(**options)


@pytest.mark.parametrize("options", [{"first_moment": 0}, {"second_moment": -1}, {"cosine": 2}, {"norm_ratio": 0.5}])
def test_thresholds_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"Threshold\("):
        Threshold(**options)
