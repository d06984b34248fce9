"""Plain PyTorch: predict the next word from the last two, with a large table of hashed word pairs.

The table's gradients are sparse, which torch.optim.AdamW refuses; compressed, it takes them.

python examples/plain_pytorch.py
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from lightning_sketch import compress, report

PAIRS, DIM, BATCH, STEPS = 200_000, 32, 256, 200


class NextWord(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, DIM)
        self.pairs = nn.Embedding(PAIRS, DIM, sparse=True)
        self.head = nn.Linear(3 * DIM, vocabulary)

    def forward(self, context: Tensor) -> Tensor:
        """Scores of the next word, [batch, vocabulary], after context [batch, 2]."""
        pair = (context[:, 0] * 1_000_003 + context[:, 1]) % PAIRS
        return self.head(torch.cat([self.words(context).flatten(1), self.pairs(pair)], dim=1))


def main() -> None:
    torch.manual_seed(0)
    tokens = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()).lower())
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    text = torch.tensor([ids[token] for token in tokens])
    model = NextWord(len(ids))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = compress(optimizer, model)  # the one line

    total = 0.0
    for step in range(1, STEPS + 1):
        at = torch.randint(2, len(text), (BATCH,))
        loss = nn.functional.cross_entropy(model(text[at[:, None] - torch.tensor([2, 1])]), text[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step}: loss {total / 100:.3f}")
            total = 0.0
    print(report(optimizer))


if __name__ == "__main__":
    main()
