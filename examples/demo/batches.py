"""Batches of token windows. Batch ``i`` is a function of the seed and ``i``: both runs see the same."""

from __future__ import annotations

import numpy as np
import torch
from corpus import IntArray
from settings import Settings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class RandomWindows(Dataset[Tensor]):
    """Whole batches ``[windows, context + length]`` from random places."""

    def __init__(self, tokens: IntArray, settings: Settings) -> None:
        self.tokens = tokens
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> Tensor:
        s = self.settings
        width = s.context + s.length
        starts = np.random.default_rng([s.seed, index]).integers(len(self.tokens) - width, size=s.windows)
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(width)].astype(np.int64))


class HeldOutTokens(Dataset[Tensor]):
    """Whole batches ``[batch tokens, context + 1]``: single tokens, spread evenly over the held-out files.

    Single, because a window's tokens are alike: as many tokens from more places measure more exactly.
    """

    def __init__(self, tokens: IntArray, settings: Settings) -> None:
        s = settings
        width = s.context + 1
        wanted = max(1, s.validation_tokens // s.batch_tokens) * s.batch_tokens
        starts = np.linspace(0, len(tokens) - width, wanted).astype(np.int64)
        rows = tokens[starts[:, None] + np.arange(width)].astype(np.int64)
        self.batches = torch.from_numpy(rows).reshape(-1, s.batch_tokens, width)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        batch: Tensor = self.batches[index]
        return batch


def loader(dataset: Dataset[Tensor]) -> DataLoader[Tensor]:
    # batch_size=None: the items are batches already. In order: their places are random as it is.
    return DataLoader(dataset, batch_size=None, shuffle=False)
