"""Accelerate: a word-level LSTM language model whose two tables' states are compressed by a policy.

python examples/accelerate_lm.py, or on two processes: torchrun --nproc_per_node 2 examples/accelerate_lm.py
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sketch import Drop, Factored, Policy, Rule, compress, report

POLICY = Policy(
    [Rule(role=("embedding", "softmax"), exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0))],
    role_hints={"head.weight": "softmax"},  # a plain nn.Linear
)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, dim: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        """Loss of predicting each word of words [batch, length] from those before it."""
        scores = self.head(self.lstm(self.embedding(words[:, :-1]))[0])
        return nn.functional.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten())


def main() -> None:
    torch.manual_seed(0)
    tokens = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()).lower())
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    text = torch.tensor([ids[token] for token in tokens])
    data = DataLoader(text[: len(text) // 17 * 17].view(-1, 17), batch_size=32, shuffle=True)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = LanguageModel(len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = compress(optimizer, model, POLICY)  # the one line, before prepare
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for words in data:
        with accelerator.accumulate(model):
            loss = model(words)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            accelerator.print(f"batch {len(losses)}: loss {sum(losses[-50:]) / 50:.3f}")
    accelerator.print(report(optimizer))


if __name__ == "__main__":
    main()
