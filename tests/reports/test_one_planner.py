"""``lightning-sketch convert --policy`` refuses what ``compress`` refuses, with the same message."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Keep, Policy, RowWise, Rule, compress
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from tests.tiny import Tiny, on_table, train


def with_option(name):
    """AdamW whose groups have an option that compressed layers refuse."""

    def make(params):
        optimizer = AdamW(params)
        optimizer.param_groups[0][name] = True
        return optimizer

    return make


def complex_model():
    model = Tiny()
    model.phases = nn.Parameter(torch.randn(6, 2, dtype=torch.complex64))
    return model


ROWS = on_table(second_moment=RowWise())
#: What, the model, the optimizer, and the policy.
REFUSED = {
    "no parameter matches": (Tiny, AdamW, Policy([Rule(role="softmax", second_moment=RowWise())])),
    "too few rows": (Tiny, AdamW, Policy([Rule(role="embedding", min_rows=1000, second_moment=RowWise())])),
    "dropped second moment": (Tiny, AdamW, on_table(exp_avg_sq=Drop())),
    "signed rows": (Tiny, AdamW, on_table(exp_avg=RowWise())),
    "signed factors": (Tiny, AdamW, on_table(exp_avg=Factored())),
    "two momenta": (Tiny, AdamW, on_table(first_moment=BFloat16(), second_moment=SM3(momentum=0.9))),
    "two momenta, kept": (
        Tiny, lambda params: RMSprop(params, momentum=0.9),
        on_table(first_moment=Keep(), second_moment=SM3(momentum=0.9)),
    ),
    "complex": (complex_model, AdamW, Policy([Rule(name="phases", second_moment=BFloat16())])),
    "amsgrad": (Tiny, lambda params: Adam(params, amsgrad=True), ROWS),
    "differentiable": (Tiny, with_option("differentiable"), ROWS),
    "codecs of another optimizer": (Tiny, Adagrad, on_table(exp_avg_sq=RowWise())),
    "codecs for no state": (Tiny, SGD, on_table(first_moment=CountSketch(compression=2))),
    "an unknown role": (Tiny, AdamW, Policy([Rule(second_moment=BFloat16())], role_hints={"kept.*": "head"})),
    "a hint without a layer": (Tiny, AdamW, Policy([Rule(second_moment=BFloat16())], role_hints={"top": "softmax"})),
    "no last linear": (
        nn.Sequential, AdamW, Policy([Rule(second_moment=BFloat16())], role_hints="last_linear"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_compress_refuses_convert_refuses(what, tmp_path):
    make_model, make_optimizer, policy = REFUSED[what]
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) if make_model is nn.Sequential else make_model()
    optimizer = make_optimizer(model.parameters())
    special = {k: v for k, v in optimizer.param_groups[0].items() if k == "differentiable" and v}
    optimizer.param_groups[0].update(dict.fromkeys(special, False))  # which needs a graph to step
    train(model, optimizer, range(2))
    optimizer.param_groups[0].update(special)
    torch.save(optimizer.state_dict(), tmp_path / "plain.pt")
    with pytest.raises((ValueError, TypeError)) as converted:
        convert_checkpoint(tmp_path / "plain.pt", tmp_path / "new.pt", to="compressed", policy=policy, model=model)
    with pytest.raises(type(converted.value)) as compressed:
        compress(optimizer, model, policy)
    assert str(converted.value) == str(compressed.value)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pt"]


@pytest.mark.parametrize("cls", [NAdam, RAdam, Adamax, Adadelta, ASGD, Rprop], ids=lambda cls: cls.__name__)
def test_an_optimizer_that_cannot_be_compressed(tmp_path, cls):
    model = Tiny()
    optimizer = cls(model.parameters())
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "old.pt")
    policy = on_table(second_moment=BFloat16(), first_moment=BFloat16())
    with pytest.raises(ValueError, match=r"have the options of no optimizer that can be compressed .*; they have .*lr"):
        convert_checkpoint(tmp_path / "old.pt", tmp_path / "new.pt", to="compressed", policy=policy, model=model)
    assert not (tmp_path / "new.pt").exists()
