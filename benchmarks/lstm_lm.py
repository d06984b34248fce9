"""The count-sketch paper's language models made small: embedding -> LSTM -> projection -> softmax.

Two settings over GCIDE's words, 20 words back, each lane of text read on from where the step before ended:

- `full_...` (the paper's tables 3 and 4, Wikitext-2): the 20,000 commonest words, width 64, LSTM of 128, full softmax,
  700 steps of 20 x 20 words. Only the embedding has sparse gradients and compressed states; one optimizer steps all
  parameters at one learning rate, as in the paper.
- `sampled_...` (tables 6, 7 and 9, Wikitext-103 and 1-Billion-Word): the 50,000 commonest words, width 64, LSTM of 256,
  sampled softmax (1,024 shared negatives), 700 steps of 64 x 20 words. Both tables have sparse gradients and are
  stepped by the method under test; the LSTM always by Adam at 8e-3, so that tables are judged by themselves.

Learning rates fall linearly to 2 %; gradients are clipped to the norm that the paper gives for the optimizer. The
learning rate of every method is tuned by factors of two on validation text with seed 0; in the sampled setting so is
eps, of the tables. Perplexity is by the full softmax on held-out blocks.

Sizes were chosen by time, a minute of one core a run, and the LSTM's learning rate by exact Adam alone: with tables at
32e-3 it comes to a validation perplexity of 56.3, 52.1 and 51.4 with 2e-3, 4e-3 and 8e-3. With the last it is at 66.9
after 400 steps, 54.1 after 600, 52.7 after 650.

    python -m benchmarks.lstm_lm --methods sampled_adam,sampled_adam_default     # results/lstm_lm.json
    python -m benchmarks.lstm_lm --summarise                                     # only write it, from finished runs
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import gcide, schedules
from benchmarks.command import run_command
from benchmarks.losses import sampled_softmax_loss, softmax_loss
from benchmarks.lstm_methods import EPSILONS, METHODS, Family, Method, build
from benchmarks.sparse_lm import draw_negatives
from benchmarks.sparse_methods import state_bytes
from benchmarks.sweep import Cache, Result, Setting, Sweep

BACK = 20  # words
WIDTH = 64  # of the embedding and of the projection
STEPS = 700
LAST_LR = 0.02  # of the first
LSTM_LR = 8e-3  # of the sampled setting's LSTM
TABLE_STD = 0.1
EVALUATED_LANES = 32
EVALUATED_WORDS = {"valid": 16_000, "test": 32_000}

#: Largest norm of all gradients together: Wikitext-2 and 1-Billion-Word, Wikitext-103, and Transformer-XL's.
CLIP: dict[Family, float] = {"momentum": 0.25, "adam": 1.0, "adagrad": 0.1, "rmsprop": 0.25}
START_LR: dict[str, dict[Family, float]] = {
    "full": {"momentum": 2.0, "adam": 8e-3},
    "sampled": {"adam": 32e-3, "adagrad": 0.4, "rmsprop": 32e-3},
}


@dataclass(frozen=True)
class Sizes:
    """What the two settings differ in."""

    words: int
    hidden: int
    lanes: int


SIZES = {"full": Sizes(words=20_000, hidden=128, lanes=20), "sampled": Sizes(words=50_000, hidden=256, lanes=64)}


class Model(nn.Module):
    """Word ids ``[length, lanes]`` -> features ``[length, lanes, 64]``, scored against the rows of `scored`."""

    def __init__(self, vocabulary: int, hidden: int, *, sampled: bool, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH, sparse=sparse)
        self.lstm = nn.LSTM(WIDTH, hidden, proj_size=WIDTH)
        self.softmax: nn.Embedding | nn.Linear
        self.softmax = nn.Embedding(vocabulary, WIDTH, sparse=True) if sampled else nn.Linear(WIDTH, vocabulary, False)
        nn.init.normal_(self.embedding.weight, std=TABLE_STD)
        nn.init.normal_(self.softmax.weight, std=TABLE_STD)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        features, state = self.lstm(self.embedding(ids), state)
        assert state is not None
        return features, (state[0].detach(), state[1].detach())


def run(setting: Setting) -> Result:
    """Train once; perplexities (None if it diverged), bytes of the sparse tables' states and seconds."""
    began = time.perf_counter()
    method = METHODS[setting.method]
    sizes, corpus = SIZES[method.softmax], _corpus(method.softmax)
    torch.manual_seed(setting.seed)
    sampled = method.softmax == "sampled"
    model = Model(corpus.vocabulary, sizes.hidden, sampled=sampled, sparse=not method.dense)
    tables = [model.embedding.weight, model.softmax.weight] if sampled else [model.embedding.weight]
    optimizers = build(method, model, tables, lr=setting.lr, eps=setting.eps, rest_lr=LSTM_LR if sampled else None)
    finite = _train(method, model, optimizers, corpus, np.random.default_rng(setting.seed))
    trained = time.perf_counter()
    return {
        "valid": _perplexity(model, corpus.valid, EVALUATED_WORDS["valid"]) if finite else None,
        "test": _perplexity(model, corpus.test, EVALUATED_WORDS["test"]) if finite else None,
        "state_bytes": state_bytes(optimizers[0]),
        "seconds": {"train": trained - began, "all": time.perf_counter() - began},
    }


def _train(
    method: Method, model: Model, optimizers: list[Optimizer], corpus: gcide.Corpus, random: np.random.Generator
) -> bool:
    """All steps; False if the run diverged."""
    lanes = SIZES[method.softmax].lanes
    text = random.permutation(corpus.train)
    batches = stretches(text, lanes, STEPS)
    sampled = method.softmax == "sampled"
    negatives, log_expected = draw_negatives(corpus.counts, STEPS if sampled else 0, random)
    first_lr = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    state = None
    for step, ids in enumerate(batches):
        share = schedules.linear(step, STEPS, last=LAST_LR)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, lr in zip(groups, first_lr, strict=True):
            group["lr"] = share * lr
        features, state = model(ids[:-1], state)
        features, target = features.flatten(0, 1), ids[1:].flatten()
        if sampled:
            rows = model.softmax(torch.cat([target, negatives[step]]))
            own, others = rows[: len(target)], rows[len(target) :]
            loss = sampled_softmax_loss(features, own, others, target, negatives[step], log_expected)
        else:
            loss = softmax_loss(features, model.softmax.weight, target)
        loss.backward()  # type: ignore[no-untyped-call]
        if not clip(model, CLIP[method.family]):
            return False
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def clip(model: nn.Module, most: float) -> bool:
    """Scale gradients, sparse ones too, so that their norm is at most `most`; False if it is not finite."""
    values = []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    norm = float(torch.stack([value.norm() for value in values]).norm())
    if norm > most:
        for value in values:
            value.mul_(most / norm)
    return math.isfinite(norm)


def stretches(blocks: gcide.Ids, lanes: int, count: int) -> Iterator[Tensor]:
    """The text in `lanes` parts that are read at once, `count` times 20 words and the one after: ``[21, lanes]``.

    Raises:
        ValueError: the text is shorter.
    """
    flat = blocks.reshape(-1)
    length = len(flat) // lanes
    if count * BACK + 1 > length:
        raise ValueError(f"{count} x {lanes} x {BACK} words were asked for; the text has {len(flat)}")
    text = torch.from_numpy(flat[: lanes * length].reshape(lanes, length).T.astype(np.int64))
    return (text[at : at + BACK + 1].contiguous() for at in range(0, count * BACK, BACK))


@torch.no_grad()
def _perplexity(model: Model, blocks: gcide.Ids, words: int) -> float | None:
    """By the full softmax, over the same held-out words every time; None if it is not finite."""
    count = words // (EVALUATED_LANES * BACK)
    total, state = 0.0, None
    for ids in stretches(blocks, EVALUATED_LANES, count):
        features, state = model(ids[:-1], state)
        total += float(softmax_loss(features.flatten(0, 1), model.softmax.weight, ids[1:].flatten()))
    mean = total / count
    return math.exp(mean) if mean < 50 else None


@functools.lru_cache(maxsize=2)
def _corpus(softmax: str) -> gcide.Corpus:
    return gcide.load(max_words=SIZES[softmax].words)


def main() -> None:
    searches = {name: (START_LR[method.softmax][method.family], _epsilons(method)) for name, method in METHODS.items()}
    sweep = Sweep(run, Cache(gcide.cache_folder() / "lstm_lm.jsonl"), searches)
    labels = {name: method.label for name, method in METHODS.items()}
    run_command("lstm_lm", __doc__, sweep, labels, prepare=lambda: _corpus("full"))


def _epsilons(method: Method) -> tuple[float, ...]:
    """Those that are tried: torch's default alone under a full softmax."""
    return EPSILONS[method.family][:1] if method.softmax == "full" else EPSILONS[method.family]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
