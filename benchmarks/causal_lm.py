"""A causal Transformer over words, and the stretches of text it is trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import gcide
from benchmarks.losses import softmax_loss

INIT_STD = 0.02


class Block(nn.Module):
    """Attention and a two-layer MLP, both on normalised inputs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        each = width // self.heads
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, each)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * self.heads, length, each)
        # By hand: torch's fused CPU attention is seven times slower with bfloat16 products.
        future = torch.full((length, length), -torch.inf).triu(1)
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=each**-0.5)
        mixed = (scores.softmax(-1) @ v).view(batch, self.heads, length, -1)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        down: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + down


class CausalLM(nn.Module):
    """Word ids ``[batch, length]`` -> features ``[batch, length, width]``, scored against `scored`.

    Args:
        tied: whether words are scored against their embeddings, or by a table of their own, ``head``.
    """

    def __init__(
        self, vocabulary: int, *, width: int, heads: int, layers: int, context: int, tied: bool = True
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)

    @property
    def scored(self) -> Tensor:
        """The table that features are scored against, ``[vocabulary, width]``."""
        return self.words.weight if self.head is None else self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)
        return features


def loss_of(model: CausalLM, ids: Tensor) -> Tensor:
    """Of predicting each of ``ids[:, 1:]`` from the words before it."""
    return softmax_loss(model(ids[:, :-1]).flatten(0, 1), model.scored, ids[:, 1:].flatten())


def draw_sequences(blocks: gcide.Ids, count: int, random: np.random.Generator, context: int) -> Tensor:
    """``count`` stretches of ``context`` words and one, none across a block, none twice."""
    length = context + 1
    rows = blocks[:, : blocks.shape[1] // length * length].reshape(-1, length)
    if count > len(rows):
        raise ValueError(f"{count} stretches of {length} words were asked for; the text has {len(rows)}")
    return torch.from_numpy(rows[random.permutation(len(rows))[:count]].astype(np.int64))


@torch.no_grad()
def mean_loss(model: CausalLM, ids: Tensor, batch: int) -> float:
    """Of all stretches, ``batch`` at a time."""
    return sum(float(loss_of(model, some)) * len(some) for some in torch.split(ids, batch)) / len(ids)
