"""A language model with two large tables, trained with sparse gradients.

Four words of context, embedding 64, tanh 256 -> 64, sampled softmax over 109,213 words (1,024
shared negatives from unigram^0.75, logQ-corrected, accidental hits removed), 2,000 steps of 1,024
words, learning rate falling linearly to 2 %. The method under test updates both tables; the hidden
layers are always updated by Adam at 1e-3. Perplexity is by the full softmax on held-out blocks.

    python -m benchmarks.sparse_lm --methods adam,cs20 --workers 2   # tune, three seeds, results/sparse_lm.json
    python -m benchmarks.sparse_lm --summarise                      # only the last, from finished runs

Matrix products in training take bfloat16 inputs where the CPU has the instructions (products are
accumulated, and everything is stored, in float32): 1.6 times as many runs in the same time.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks import gcide, schedules
from benchmarks.command import run_command
from benchmarks.losses import sampled_softmax_loss
from benchmarks.precision import bfloat16_products
from benchmarks.sparse_methods import METHODS, build, state_bytes
from benchmarks.sweep import Cache, Result, Setting, Sweep, false_if_diverged

CONTEXT = 4  # words
WIDTH = 64
HIDDEN = 256
BATCH = 1_024  # words
NEGATIVES = 1_024  # per step, shared by the batch
STEPS = 2_000
HIDDEN_LR = 1e-3
LAST_LR = 0.02  # of the first
TABLE_STD = 0.1
VALID_WORDS = 8_192
TEST_WORDS = 16_384
EVALUATION_SEED = 1

START_LR = {"adam": 64e-3, "adagrad": 0.4}
EPSILONS = {"adam": (1e-8, 1e-6, 1e-5, 1e-4), "adagrad": (1e-10, 1e-5, 1e-4, 1e-3)}  # the first: torch's default


class Model(nn.Module):
    """Four words -> 64 features; the word tables have one row of 64 per word."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH, sparse=True)
        self.softmax = nn.Embedding(vocabulary, WIDTH, sparse=True)
        self.hidden = nn.Sequential(nn.Linear(CONTEXT * WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH))
        nn.init.normal_(self.words.weight, std=TABLE_STD)
        nn.init.normal_(self.softmax.weight, std=TABLE_STD)

    def forward(self, context: Tensor) -> Tensor:
        features: Tensor = self.hidden(self.words(context).flatten(1))
        return features  # [batch, 64]


@dataclass(frozen=True)
class Batches:
    """All steps of one seed, drawn before training."""

    context: Tensor  # [steps, batch, 4]
    target: Tensor  # [steps, batch]
    negatives: Tensor  # [steps, 1024], ascending
    log_expected: Tensor  # [vocabulary], log of how often a word is expected among the negatives


def run(setting: Setting) -> Result:
    """Train once; perplexities (None if it diverged), state bytes and seconds."""
    began = time.perf_counter()
    corpus, batches = _corpus(), _batches(setting.seed)
    torch.manual_seed(setting.seed)
    model = Model(corpus.vocabulary)
    tables = build(METHODS[setting.method], model, [model.words, model.softmax], lr=setting.lr, eps=setting.eps)
    set_up = time.perf_counter()

    finite = train(model, tables, batches, setting.lr)
    trained = time.perf_counter()

    return {
        "valid": perplexity_on(model, corpus.valid, VALID_WORDS) if finite else None,
        "test": perplexity_on(model, corpus.test, TEST_WORDS) if finite else None,
        "state_bytes": state_bytes(tables),
        "seconds": {"set_up": set_up - began, "train": trained - set_up, "all": time.perf_counter() - began},
    }


@false_if_diverged
def train(model: Model, tables: Any, batches: Batches, lr: float) -> bool:
    """All steps; False if the run diverged.

    Args:
        tables: the optimizer of both tables, or what has its `param_groups`, `step` and `zero_grad`.
    """
    steps = len(batches.target)
    hidden = torch.optim.Adam(model.hidden.parameters(), lr=HIDDEN_LR)
    with bfloat16_products():
        for step in range(steps):
            share = schedules.linear(step, steps, last=LAST_LR)
            _set_lr(tables, share * lr)
            _set_lr(hidden, share * HIDDEN_LR)
            _loss(model, batches, step).backward()  # type: ignore[no-untyped-call]
            for optimizer in (tables, hidden):
                optimizer.step()
                optimizer.zero_grad()
    return bool(torch.isfinite(model.softmax.weight).all())


def _loss(model: Model, batches: Batches, step: int) -> Tensor:
    target, negatives = batches.target[step], batches.negatives[step]
    rows = model.softmax(torch.cat([target, negatives]))  # [batch + 1024, 64]: one sparse gradient
    return sampled_softmax_loss(
        model(batches.context[step]), rows[:BATCH], rows[BATCH:], target, negatives, batches.log_expected
    )


@functools.lru_cache(maxsize=1)
def _corpus() -> gcide.Corpus:
    return gcide.load(min_count=2)


@functools.lru_cache(maxsize=1)
def _batches(seed: int) -> Batches:
    return draw(_corpus(), seed, STEPS)


def draw(corpus: gcide.Corpus, seed: int, steps: int) -> Batches:
    """The batches of a seed."""
    random = np.random.default_rng(seed)
    context, target = _windows(corpus.train, steps * BATCH, random)
    negatives, log_expected = draw_negatives(corpus.counts, steps, random)
    return Batches(
        context=context.view(steps, BATCH, CONTEXT),
        target=target.view(steps, BATCH),
        negatives=negatives,
        log_expected=log_expected,
    )


def draw_negatives(counts: npt.NDArray[np.int64], steps: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Words from unigram^0.75, ascending, ``[steps, 1024]``; log of how often each is expected, ``[vocabulary]``."""
    share = counts.astype(np.float64) ** 0.75
    share /= share.sum()
    drawn = np.searchsorted(np.cumsum(share), random.random((steps, NEGATIVES)))
    drawn = np.sort(np.minimum(drawn, len(counts) - 1), axis=1)
    never = np.finfo(np.float32).tiny  # words seen only in held-out blocks
    return torch.from_numpy(drawn), torch.from_numpy(np.log(np.maximum(NEGATIVES * share, never))).float()


def _windows(blocks: gcide.Ids, words: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """``words`` distinct places: the context ``[words, 4]``, which never crosses a block, and the word."""
    flat = blocks.reshape(-1)
    places = np.arange(len(flat)).reshape(blocks.shape)[:, CONTEXT:].reshape(-1)
    places = random.permutation(places)[:words]
    context = flat[places[:, None] - np.arange(CONTEXT, 0, -1)]
    return torch.from_numpy(context.astype(np.int64)), torch.from_numpy(flat[places].astype(np.int64))


@torch.no_grad()
def perplexity_on(model: Model, blocks: gcide.Ids, words: int) -> float | None:
    """By the full softmax, over the same held-out words every time; None if it is not finite."""
    context, target = _windows(blocks, words, np.random.default_rng(EVALUATION_SEED))
    table = model.softmax.weight
    tile = 2_048  # rows of the table whose scores fit in cache
    loss = 0.0
    for some, wanted in zip(torch.split(context, 512), torch.split(target, 512), strict=True):
        features = model(some)
        scores = features.new_empty(len(some), tile)
        log_sum = features.new_full((len(some),), -math.inf)
        for rows in torch.split(table, tile):
            part = scores.view(-1)[: len(some) * len(rows)].view(len(some), len(rows))
            torch.mm(features, rows.T, out=part)
            largest = torch.maximum(part.amax(1), log_sum)
            total = part.sub_(largest[:, None]).exp_().sum(1) + (log_sum - largest).exp()
            log_sum = total.log() + largest
        loss += float((log_sum - (features * table[wanted]).sum(1)).sum())
    mean = loss / words
    return math.exp(mean) if mean < 50 else None


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def main() -> None:
    searches = {name: (START_LR[method.family], EPSILONS[method.family]) for name, method in METHODS.items()}
    cache = Cache(gcide.cache_folder() / "sparse_lm.jsonl")
    # The usual baseline is tuned in the learning rate alone.
    sweep = Sweep(run, cache, searches, default_eps_too={"adam"})
    run_command("sparse_lm", __doc__, sweep, {name: method.label for name, method in METHODS.items()}, prepare=_corpus)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
