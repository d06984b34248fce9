"""The largest batch of an extreme classifier at the size of the count-sketch paper, by optimizer, below one memory cap.

A classifier of section 6.4 (Spring et al., ICML 2019): words hashed to 80,000, 30 of them in an example, 1,024 numbers
for each word, 20,000 meta-classes of 49.5 million classes; 414 MB of weights. Words are drawn by Zipf's law. The
classifiers of MACH are trained independently of each other, so this is one of them. The cap is about what the exact
optimizer needs for the paper's batch of 750.

    python -m benchmarks.extreme_memory                      # largest batches: results/extreme_memory.json
    python -m benchmarks.extreme_memory --time   # how long an epoch takes at them; wants a quiet machine
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.largest_batch import Step, Study
from benchmarks.mach import Classifier, loss_of
from benchmarks.mach_methods import METHODS, build
from benchmarks.memory_cap import MIB

WORDS = 80_000
WIDTH = 1_024
CLASSES = 20_000
NONZEROS = 30
BATCH = 750  # the paper's, by exact Adam


def make(name: str) -> Step:
    """A classifier and its optimizer."""
    torch.manual_seed(0)
    method = METHODS[name]
    model = Classifier(WORDS, WIDTH, CLASSES, sparse=method.sparse)
    optimizers = build(method, model, lr=1e-3)

    def step(examples: int) -> None:
        ids, starts = _words(examples * NONZEROS), torch.arange(0, examples * NONZEROS, NONZEROS)
        classes, document = torch.randint(CLASSES, (examples,)), torch.arange(examples)
        loss_of(model(ids, starts), document, classes, torch.ones(examples)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _words(count: int) -> Tensor:
    """Ids by Zipf's law with exponent 1: uniform in the logarithm of the rank."""
    rank = torch.exp(torch.rand(count, dtype=torch.float64) * math.log(WORDS + 1))
    return rank.long().sub_(1).clamp_(0, WORDS - 1)


NAMES = "sparse_adam", "adam", "adagrad", "paper", "default", "default_all", "default_in_backward"
STUDY = Study(
    name="extreme_memory",
    methods={name: METHODS[name].label for name in NAMES},
    make=make,
    cap=1_888 * MIB,
    batch=BATCH,
    examples=6_000,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
