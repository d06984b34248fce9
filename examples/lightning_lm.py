"""A small language model in Lightning, with its optimizer states compressed. Learns from Python's own manual.

python examples/lightning_lm.py
"""

from __future__ import annotations

import math
import re
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sketch import BFloat16, Drop, Factored, Policy, RowWise, Rule, report
from lightning_sketch.integrations.lightning import OptimizerStateCompression

CONTEXT, DIM = 4, 64


class NextWord(L.LightningModule):
    """The last words -> the next one. Nothing here knows that states are compressed."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, DIM, sparse=True)
        self.hidden = nn.Sequential(nn.Linear(CONTEXT * DIM, 128), nn.GELU(), nn.Linear(128, DIM))
        self.output = nn.Linear(DIM, vocabulary)

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        """Windows of word ids, [batch, CONTEXT + 1] -> loss."""
        features = self.hidden(self.table(windows[:, :-1]).flatten(1))
        return nn.functional.cross_entropy(self.output(features), windows[:, -1])

    def validation_step(self, windows: Tensor, index: int) -> None:
        self.log("loss", self.training_step(windows, index), batch_size=len(windows))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)  # by itself, AdamW refuses sparse gradients


POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0)),
        Rule(role="softmax", name="*.weight", exp_avg=BFloat16(), exp_avg_sq=RowWise()),
    ],
    role_hints={"output.weight": "softmax"},  # a plain nn.Linear does not say what it is for
)


def main(epochs: int = 1) -> float:
    """Train, print what the states cost, and return the perplexity on the last tenth of the text."""
    L.seed_everything(0, verbose=False)
    words = re.findall(r"\w+|[^\w\s]", " ".join(text for _, text in sorted(topics.items())))
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    windows = torch.tensor([ids[word] for word in words]).unfold(0, CONTEXT + 1, 1)  # [positions, CONTEXT + 1]
    cut = len(windows) * 9 // 10
    train, held_out = windows[torch.randperm(cut)].split(512), windows[cut:].split(512)

    model = NextWord(len(ids))
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[OptimizerStateCompression(POLICY)],  # the only line that Lightning needs
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=None, shuffle=True), DataLoader(held_out, batch_size=None))
    perplexity = math.exp(trainer.callback_metrics["loss"])
    print(report(trainer.optimizers[0]))
    print(f"perplexity on the held-out tenth {perplexity:.0f}, of {len(ids):,} words")
    return perplexity


if __name__ == "__main__":
    main()
