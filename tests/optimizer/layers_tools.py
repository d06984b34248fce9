"""A model with a layer for every kind of codec, and its optimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW

from lightning_sketch import CountSketch, Policy, Rule, compress
from tests.tiny import CODECS


class Layers(nn.Module):
    """A layer for every kind of codec, one kept, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(len(CODECS)):
            self.register_module(f"l{number}", nn.Linear(8, 20, bias=False))
        self.kept = nn.Linear(8, 20, bias=False)
        self.scalar = nn.Parameter(torch.tensor(0.5))


def policy() -> Policy:
    rules = [Rule(name=f"l{number}.weight", **codecs) for number, codecs in enumerate(CODECS.values())]
    return Policy([*rules, Rule(name="scalar", second_moment=CountSketch(width=9))])


def make_layers(make=AdamW, **kwargs):
    torch.manual_seed(0)
    model = Layers()
    return model, compress(make(model.parameters(), **kwargs), model, policy())


def give(model, step):
    for position, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + position)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
