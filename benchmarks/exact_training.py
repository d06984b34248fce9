"""A training of the tied Transformer by exact AdamW, whose gradients other states are measured on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import gcide, tied_transformer
from benchmarks.causal_lm import CausalLM, draw_sequences, loss_of
from benchmarks.precision import bfloat16_products
from benchmarks.tied_methods import METHODS, build
from benchmarks.tied_transformer import BATCH, CONTEXT, LARGEST_NORM, SCHEDULES

LR, EPS = 2e-3, 1e-8


def make(steps: int) -> tuple[CausalLM, Optimizer, Iterator[int]]:
    """A model, its optimizer, and steps as they are iterated over: each is yielded, from 0, when gradients are there.

    The optimizer's step is the caller's; gradients are cleared after it.
    """
    corpus = gcide.load(max_words=tied_transformer.WORDS)
    torch.manual_seed(0)
    model = tied_transformer.make_model(corpus.vocabulary)
    optimizer = build(METHODS["adamw"], model, model.words, lr=LR, eps=EPS)

    def with_gradients() -> Iterator[int]:
        batches = draw_sequences(corpus.train, steps * BATCH, np.random.default_rng(0), CONTEXT)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LR * SCHEDULES["linear"](step)
            with bfloat16_products():
                loss_of(model, batches[step * BATCH : (step + 1) * BATCH]).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            yield step
            optimizer.zero_grad()

    return model, optimizer, with_gradients()
