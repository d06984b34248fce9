"""Steps are counted as torch.optim counts them, whatever the default dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW

from lightning_sketch import CountSketch, Policy, RowWise, Rule, compress, decompress
from lightning_sketch.layers.step_count import step_tensor
from tests.tiny import default_dtype


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def default(request):
    with default_dtype(request.param):
        yield request.param


def test_it_counts_past_what_16_bits_can(default):
    count = step_tensor(4000)
    count += step_tensor(1)
    assert count.item() == 4001
    assert (count.ndim, count.device.type) == (0, "cpu")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("make", "codec"),
    [(AdamW, RowWise()), (Adagrad, RowWise()), (SGD, CountSketch(compression=2))],
)
def test_the_steps_of_a_training_under_a_default_dtype(make, codec, sparse, default):
    layer = nn.Embedding(30, 4, sparse=sparse, dtype=torch.float32)
    options = {"momentum": 0.9} if make is SGD else {"weight_decay": 0.0}
    moment = {"first_moment": codec} if make is SGD else {"second_moment": codec}
    optimizer = compress(make(layer.parameters(), lr=1e-3, **options), layer, Policy([Rule(name="*", **moment)]))
    for _ in range(300):
        optimizer.zero_grad()
        layer(torch.tensor([1, 2, 2])).sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert float(optimizer.state[layer.weight]["step"]) == 301
    if make is not SGD and not sparse:
        decompress(optimizer)
        assert float(optimizer.state[layer.weight]["step"]) == 301
        optimizer.step()
