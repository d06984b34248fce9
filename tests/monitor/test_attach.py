"""What can be watched, and what is refused with the reason."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, NAdam

from lightning_sketch import Monitor, compress, decompress
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.monitor.refused import refuse_part
from lightning_sketch.sharding.dtensor import even_shard
from tests.tiny import CODECS, Tiny, on_table, train

POLICY = on_table(**CODECS["sketch"])


def test_a_converted_optimizer_can_be_watched_and_left_alone_again():
    model, monitor = Tiny(), Monitor(every=1)
    optimizer = compress(AdamW(model.parameters()), model, POLICY)
    monitor.attach(optimizer)
    train(model, optimizer, range(2))
    assert monitor.made == 2
    monitor.detach(optimizer)
    train(model, optimizer, range(2))
    assert monitor.made == 2
    assert monitor.figures()["optimizer_state/table.weight/update_cosine"] < 1


def test_several_optimizers_may_have_one_monitor():
    model = nn.ModuleDict({"a": Tiny(), "b": Tiny()})
    optimizers = [AdamW(model["a"].parameters()), SGD(model["b"].parameters(), lr=0.1, momentum=0.9)]
    monitor = Monitor(every=1)
    policy = on_table(first_moment="BFloat16")
    compress(optimizers, model, policy, monitor=monitor)
    for part, optimizer in zip(model.values(), optimizers, strict=True):
        train(part, optimizer, range(1))
    assert set(monitor.by_layer()) == {"a.table.weight", "b.table.weight"}


def test_some_layers_may_be_watched_by_name_or_pattern():
    model = nn.ModuleDict({"a": Tiny(), "b": Tiny()})
    for layers in ("a.table.weight", ["a.*"], "re:^a"):
        monitor = Monitor(every=1, layers=layers)
        optimizer = compress(AdamW(model.parameters()), model, POLICY, monitor=monitor)
        train(model, optimizer, range(1))
        assert list(monitor.by_layer()) == ["a.table.weight"]
    with pytest.raises(ValueError, match="re:"):
        Monitor(layers="re:(")


def test_copies_pickles_and_decompressed_optimizers_are_not_watched():
    model, monitor = Tiny(), Monitor(every=1)
    optimizer = compress(AdamW(model.parameters()), model, POLICY, monitor=monitor)
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.compression.watcher is None
    decompress(optimizer)
    train(model, optimizer, range(1))
    assert monitor.made == 0


def test_a_monitor_wants_a_converted_optimizer():
    with pytest.raises(TypeError, match="this is a AdamW; call compress"):
        Monitor().attach(AdamW(Tiny().parameters()))


def refused_by_compress(match, make=AdamW, policy=POLICY, **options):
    model = Tiny()
    optimizer = make(model.parameters())
    kind = type(optimizer)
    with pytest.raises(ValueError, match=match):
        compress(optimizer, model, policy, monitor=Monitor(), **options)
    assert type(optimizer) is kind


def test_steps_in_backward_are_refused():
    refused_by_compress("cannot watch steps in backward", step_in_backward=True)
    model = Tiny()
    optimizer = compress(AdamW(model.parameters()), model, POLICY, monitor=Monitor())
    with pytest.raises(ValueError, match=r"has a monitor.*detach"):
        compress(optimizer, model, POLICY, step_in_backward=True)


def test_optimizers_without_a_rule_are_refused():
    refused_by_compress("cannot watch table.weight", make=NAdam, policy=on_table(first_moment="BFloat16"))


def test_capturable_is_refused():
    refused_by_compress("cannot watch capturable=True", make=lambda params: AdamW(params, capturable=True))


def test_layers_whose_rows_are_cut_are_refused():
    layer = LayerRecord("table.weight", 0, (30, 4), {"exp_avg": True}, {"exp_avg": CODECS["sketch"]["first_moment"]})
    with pytest.raises(RuntimeError, match=r"cannot watch table\.weight, whose rows are cut"):
        refuse_part(LayerPart(layer, even_shard((30, 4), 1, 2, 0)))
    refuse_part(LayerPart(layer, even_shard((30, 4), 0, 2, 0)))


def test_flat_tensors_of_an_engine_are_refused():
    model = Tiny()
    optimizer = compress(AdamW(model.parameters()), model, POLICY)
    optimizer.param_groups[0]["params"] = [torch.zeros(7)]
    with pytest.raises(RuntimeError, match="does not work under DeepSpeed's ZeRO"):
        Monitor().attach(optimizer)
