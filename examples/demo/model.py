"""A small next-token model with two large tables, as a user would write it for Lightning.

The tables hold nearly all parameters and get sparse gradients, so they are SparseAdam's; the few
dense layers between them are AdamW's. Nothing here knows that optimizer states can be compressed.
"""

from __future__ import annotations

import time
from typing import Any, cast

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from settings import Settings
from torch import Tensor, nn


class NextToken(L.LightningModule):  # type: ignore[misc]
    """Embeddings of the last ``context`` tokens -> two dense layers -> sampled softmax."""

    def __init__(self, settings: Settings, counts: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self.automatic_optimization = False  # Lightning's way with two optimizers
        self.settings = s = settings
        self.input = nn.Embedding(len(counts), s.dim, sparse=True)
        self.mix = nn.Sequential(nn.Linear(s.context * s.dim, s.hidden), nn.GELU(), nn.Linear(s.hidden, s.dim))
        self.norm = nn.LayerNorm(s.dim)
        self.output = nn.Embedding(len(counts), s.dim, sparse=True)
        nn.init.normal_(self.input.weight, std=0.1)
        nn.init.zeros_(self.output.weight)  # starts at the uniform distribution

        proposal = torch.from_numpy(counts + 1.0) ** 0.75
        proposal = proposal / proposal.sum()
        self.log_proposal: Tensor
        self.proposal_cdf: Tensor
        self.register_buffer("log_proposal", proposal.log().float())  # [vocabulary]
        self.register_buffer("proposal_cdf", proposal.cumsum(0).float())
        self.optimizer_seconds: list[float] = []  # one entry a step

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[batch, context - 1 + length]`` -> features ``[batch * length, dim]``."""
        context, dim = self.settings.context, self.settings.dim
        length = tokens.shape[1] - context + 1
        rows = self.input(tokens)  # [batch, context - 1 + length, dim]
        shifted = torch.cat([rows[:, i : i + length] for i in range(context)], dim=-1)
        newest = rows[:, context - 1 :]
        features: Tensor = self.norm(newest + self.mix(shifted))
        return features.reshape(-1, dim)

    def sampled_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy against negatives shared by the batch (unigram^0.75, logQ-corrected)."""
        uniform = torch.rand(self.settings.negatives, device=targets.device)
        negatives = torch.searchsorted(self.proposal_cdf, uniform)
        negatives = negatives.clamp_(max=len(self.proposal_cdf) - 1)  # rounding of the last bin
        rows = self.output(torch.cat([targets, negatives]))
        positive_rows, negative_rows = rows[: len(targets)], rows[len(targets) :]
        positive = (features * positive_rows).sum(1, keepdim=True)  # [tokens, 1]
        # Each negative stands for 1 / (number * probability) classes: the sum is unbiased.
        correction = self.log_proposal[negatives] + np.log(len(negatives))
        negative = features @ negative_rows.T - correction  # [tokens, negatives]
        negative = negative.masked_fill(negatives == targets[:, None], -torch.inf)
        loss: Tensor = torch.cat([positive, negative], dim=1).logsumexp(1) - positive[:, 0]
        return loss.mean()

    def full_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over the whole vocabulary, a slice of it at a time to save memory."""
        total = torch.full((len(targets),), -torch.inf, device=features.device)
        for start in range(0, len(self.output.weight), 2048):
            rows = self.output.weight[start : start + 2048]
            total = torch.logaddexp(total, (features @ rows.T).logsumexp(1))
        loss: Tensor = total - (features * self.output(targets)).sum(1)
        return loss.mean()

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        tables, hidden = cast(list[Any], self.optimizers())
        loss = self.sampled_loss(self(batch[:, :-1]), self.targets(batch))
        tables.zero_grad()
        hidden.zero_grad()
        self.manual_backward(loss)
        started = time.perf_counter()
        tables.step()
        hidden.step()
        self.optimizer_seconds.append(time.perf_counter() - started)
        for scheduler in cast(list[Any], self.lr_schedulers()):
            scheduler.step()
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss.detach()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        loss = self.full_loss(self(batch[:, :-1]), self.targets(batch))
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch))

    def targets(self, batch: Tensor) -> Tensor:
        return batch[:, self.settings.context :].reshape(-1)

    def configure_optimizers(self) -> Any:
        s = self.settings
        tables = torch.optim.SparseAdam([self.input.weight, self.output.weight], lr=s.table_lr)
        dense = [*self.mix.parameters(), *self.norm.parameters()]
        hidden = torch.optim.AdamW(dense, lr=s.hidden_lr)
        warmup = max(1, round(s.warmup * s.steps))

        def schedule(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return max(0.02, 1 - (step - warmup) / (s.steps - warmup))

        optimizers = [tables, hidden]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
