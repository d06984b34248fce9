"""Muon on the hidden matrices, AdamW on tables and vectors, both compressed by one call. Learns from Python's manual.

torch.optim.Muon has no update rule of ours: its momentum is kept in bfloat16, and its own step works on it,
a few layers at a time. AdamW's tables lose their first moment, and keep row and column means of the second.

python examples/muon_lm.py
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from lightning_sketch import BFloat16, Drop, Factored, Policy, Rule, compress, report

CONTEXT, DIM, BATCH, STEPS = 4, 32, 128, 60

POLICY = Policy(
    [
        Rule(role=("embedding", "softmax"), first_moment=Drop(), second_moment=Factored(floor=1.0)),
        Rule(role="hidden", first_moment=BFloat16()),
    ]
)


class NextWord(nn.Module):
    """The last words -> the next one, with one table for both."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, DIM)
        nn.init.normal_(self.table.weight, std=0.02)
        self.mix = nn.Linear(CONTEXT * DIM, 4 * DIM)
        self.layers = nn.Sequential(nn.LayerNorm(4 * DIM), nn.GELU(), nn.Linear(4 * DIM, 4 * DIM), nn.GELU())
        self.out = nn.Linear(4 * DIM, DIM)

    def forward(self, context: Tensor) -> Tensor:
        """Scores of the next word, [batch, vocabulary], after context [batch, CONTEXT]."""
        features = self.out(self.layers(self.mix(self.table(context).flatten(1))))
        return features @ self.table.weight.T  # type: ignore[no-any-return]


def main() -> None:
    torch.manual_seed(0)
    tokens = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()).lower())
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    text = torch.tensor([ids[token] for token in tokens])
    model = NextWord(len(ids))

    hidden = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    others = [param for param in model.parameters() if all(param is not matrix for matrix in hidden)]
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=3e-3)
    optimizers = compress([muon, adamw], model, POLICY)  # the one line

    total = 0.0
    for step in range(1, STEPS + 1):
        at = torch.randint(CONTEXT, len(text), (BATCH,))
        loss = nn.functional.cross_entropy(model(text[at[:, None] - torch.arange(CONTEXT, 0, -1)]), text[at])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        total += loss.item()
        if step % 20 == 0:
            print(f"step {step}: loss {total / 20:.3f}")
            total = 0.0
    for optimizer in optimizers:
        print(f"{type(optimizer).__name__}:\n{report(optimizer)}")


if __name__ == "__main__":
    main()
