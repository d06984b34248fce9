"""What the benchmarks of docs/papers.md have beside the package: the released code's sketch, Adagrad with momentum."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Adagrad, RMSprop

from benchmarks.adagrad_momentum import AdagradMomentum
from benchmarks.in_row_sketch import InRowSketch
from lightning_sketch import SM3, Policy, Rule, compress
from lightning_sketch.kernels.reference import hash_rows, layer_seed


def gradients(*shape: int, steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def test_an_element_steps_by_its_own_square_and_its_bucket_s_past():
    model = nn.ParameterDict({"w": torch.zeros(3, 2, 5)})
    optimizer = RMSprop(model.parameters(), lr=1.0, alpha=0.9, eps=0.0)
    optimizer = compress(optimizer, model, Policy([Rule(name="w", second_moment=InRowSketch(5))]))
    bucket = hash_rows(torch.arange(10), layer_seed(0, "w"), 1, 2)[0][0]
    table = torch.zeros(3, 2)
    for gradient in gradients(3, 2, 5):
        before = model["w"].detach().clone()
        model["w"].grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[model["w"]]["square_avg_table"]
        found = ((gradient / (before - model["w"].detach())) ** 2).flatten(1)
        squares = 0.1 * gradient.flatten(1).square()
        torch.testing.assert_close(found, 0.9 * table[:, bucket] + squares)
        table = (0.9 * table).index_add_(1, bucket, squares)
        torch.testing.assert_close(state, table)


def test_adagrad_with_momentum_is_sm3_of_a_vector():
    ours, theirs = nn.ParameterDict({"w": torch.zeros(7)}), nn.ParameterDict({"w": torch.zeros(7)})
    exact = AdagradMomentum(ours.parameters(), lr=0.1)
    sm3 = Adagrad(theirs.parameters(), lr=0.1)
    sm3 = compress(sm3, theirs, Policy([Rule(name="w", sum=SM3(momentum=0.9))]))
    for gradient in gradients(7):
        for model, optimizer in ((ours, exact), (theirs, sm3)):
            model["w"].grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours["w"], theirs["w"])
