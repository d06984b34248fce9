"""A small language model in a Lightning Fabric loop, with its optimizer states compressed.

python examples/fabric_lm.py
"""

from __future__ import annotations

import math
import re
from pydoc_data.topics import topics

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_sketch import BFloat16, Drop, Factored, Policy, RowWise, Rule, compress, report

CONTEXT, DIM = 4, 64


class NextWord(nn.Module):
    """The last words -> logits of the next one."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, DIM, sparse=True)
        self.hidden = nn.Sequential(nn.Linear(CONTEXT * DIM, 128), nn.GELU(), nn.Linear(128, DIM))
        self.output = nn.Linear(DIM, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        features: Tensor = self.hidden(self.table(words).flatten(1))
        logits: Tensor = self.output(features)
        return logits


POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0)),
        Rule(role="softmax", name="*.weight", exp_avg=BFloat16(), exp_avg_sq=RowWise()),
    ],
    role_hints={"output.weight": "softmax"},  # a plain nn.Linear does not say what it is for
)


def main(steps: int = 150) -> float:
    """Train, print what the states cost, and return the perplexity on the last tenth of the text."""
    fabric = Fabric(devices=1)
    fabric.seed_everything(0, verbose=False)
    words = re.findall(r"\w+|[^\w\s]", " ".join(text for _, text in sorted(topics.items())))
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    windows = torch.tensor([ids[word] for word in words]).unfold(0, CONTEXT + 1, 1)  # [positions, CONTEXT + 1]
    train, held_out = windows.split(len(windows) * 9 // 10)

    model = NextWord(len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(model, optimizer)
    compress(optimizer, model, POLICY)  # the one line; before fabric.setup it does the same
    for _ in range(steps):
        batch = fabric.to_device(train[torch.randint(len(train), (512,))])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

    print(report(optimizer))
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(part[:, :-1]), part[:, -1], reduction="sum")
            for part in map(fabric.to_device, held_out.split(512))
        ]
    perplexity = math.exp(sum(map(float, losses)) / len(held_out))
    print(f"perplexity on the held-out tenth {perplexity:.0f}, of {len(ids):,} words")
    return perplexity


if __name__ == "__main__":
    main()
