"""LlamaFactory#6186: the padding row, and rows that a gradient hook masks, must not train.

Under a sketched first moment they do, by nature of a sketch: whoever compresses so is warned. Each codec is held to
what the guide says of it.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from lightning_sketch import SM3, BFloat16, Codec, CountSketch, Drop, Factored, Keep, Policy, RowWise, Rule, compress

ROWS, DIM, PADDING = 400, 8, 0
MASKED = torch.arange(ROWS) % 10 == 3
STAYING = MASKED.clone()
STAYING[PADDING] = True
SKETCH, LAZY = CountSketch(), CountSketch(lazy=True)
FIRST = {"Drop": Drop(), "Keep": Keep(), "BFloat16": BFloat16(), "CountSketch, lazy": LAZY, "CountSketch": SKETCH}
SECOND = {
    "RowWise": RowWise(), "RowWise sketched": RowWise(compression=10), "Factored": Factored(), "SM3": SM3(),
    "Factored with a floor": Factored(floor=1.0), "BFloat16": BFloat16(),
    "CountSketch, lazy": LAZY, "CountSketch": SKETCH,
}  # fmt: skip
#: Second moments that other rows make larger than zero.
SHARED = ("RowWise sketched", "Factored with a floor", "CountSketch")


def table(sparse: bool = False, hook: bool = True) -> nn.Embedding:
    model = nn.Embedding(ROWS, DIM, padding_idx=PADDING, sparse=sparse)
    nn.init.normal_(model.weight)
    if hook:
        model.weight.register_hook(lambda grad: grad.masked_fill(MASKED[:, None], 0.0))
    return model


def policy(first: Codec, second: Codec = SKETCH) -> Policy:
    return Policy([Rule(role="embedding", first_moment=first, second_moment=second)])


def moved(model: nn.Embedding, optimizer: Optimizer) -> Tensor:
    """How far each row goes in ten steps with a gradient for every row."""
    before = model.weight.detach().clone()
    for _ in range(10):
        optimizer.zero_grad()
        (model(torch.arange(ROWS)) * torch.randn(ROWS, DIM)).sum().backward()
        optimizer.step()
    return (model.weight.detach() - before).abs().amax(dim=1)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return [text for text in texts if "its first moment is sketched" in text]


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_rows_without_gradient_stay_or_their_owner_is_warned(first, second, caplog):
    model = table()
    optimizer = compress(
        AdamW(model.parameters(), lr=0.1, weight_decay=0.0), model, policy(FIRST[first], SECOND[second])
    )
    moves = first == "CountSketch" and second in SHARED
    assert len(warnings_of(caplog)) == moves
    found = moved(model, optimizer)
    assert found[~STAYING].min() > 0
    assert bool((found[STAYING] > 0).any()) == moves


@pytest.mark.parametrize("first", FIRST)
def test_momentum_alone(first, caplog):
    model = table()
    optimizer = compress(SGD(model.parameters(), lr=0.1, momentum=0.9), model, policy(FIRST[first]), allow_empty=True)
    moves = first == "CountSketch"
    assert len(warnings_of(caplog)) == moves
    assert bool((moved(model, optimizer)[STAYING] > 0).any()) == moves


@pytest.mark.parametrize("first", FIRST)
def test_momentum_of_updates(first, caplog):
    model = table()
    make = RMSprop(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = compress(make, model, policy(FIRST[first], RowWise()))
    moves = first == "CountSketch"
    assert len(warnings_of(caplog)) == moves
    assert bool((moved(model, optimizer)[STAYING] > 0).any()) == moves


def test_the_warning_names_layer_reason_and_remedies(caplog):
    model = nn.Sequential(nn.Linear(2, 2), table())
    compress(AdamW(model.parameters()), model, policy(SKETCH))
    (text,) = warnings_of(caplog)
    for part in ("1.weight has padding_idx=0 and a gradient hook", "lazy=True", "BFloat16()", "Drop()"):
        assert part in text


def test_without_padding_and_hook_nothing_is_said(caplog):
    model = nn.Embedding(ROWS, DIM)
    compress(AdamW(model.parameters()), model, policy(SKETCH))
    assert not warnings_of(caplog)


def test_a_sketch_with_a_bucket_for_every_row_is_no_sketch(caplog):
    model = table()
    wide = CountSketch(width=ROWS)
    optimizer = compress(AdamW(model.parameters(), weight_decay=0.0), model, policy(wide, wide))
    assert not warnings_of(caplog)
    assert moved(model, optimizer)[STAYING].max() == 0


def test_a_hook_after_accumulation_and_one_of_the_module_are_seen(caplog):
    for register in (
        lambda model: model.weight.register_post_accumulate_grad_hook(lambda param: None),
        lambda model: model.register_full_backward_pre_hook(lambda module, grads: None),
    ):
        model = nn.Embedding(ROWS, DIM)
        register(model)
        compress(AdamW(model.parameters()), model, policy(SKETCH))
        assert "a gradient hook" in warnings_of(caplog)[0]


def test_the_padding_row_is_absent_from_sparse_gradients(caplog):
    model = table(sparse=True, hook=False)
    optimizer = compress(AdamW(model.parameters(), weight_decay=0.0), model, policy(SKETCH))
    assert not warnings_of(caplog)
    assert moved(model, optimizer)[PADDING] == 0


def test_a_tied_head_gives_the_padding_row_a_gradient(caplog):
    model = nn.Sequential(table(hook=False), nn.Linear(DIM, ROWS, bias=False))
    model[1].weight = model[0].weight
    compress(AdamW(model.parameters()), model, policy(SKETCH))
    model(torch.tensor([1])).sum().backward()
    assert model[0].weight.grad[PADDING].any()
    assert not warnings_of(caplog)


def test_the_padding_row_of_a_parametrized_table_is_seen(caplog):
    model = table(hook=False)
    torch.nn.utils.parametrize.register_parametrization(model, "weight", nn.Identity())
    compress(AdamW(model.parameters()), model, policy(SKETCH))
    assert "padding_idx=0" in warnings_of(caplog)[0]
