"""Extreme classification: which packages a Debian package depends on, from its description, by hashed meta-classes.

As in section 6.4 of the count-sketch paper (MACH): 14,529 labels are hashed to 1,024 meta-classes, four times over;
words are hashed, too. Each repetition is a classifier of its own: the mean of 64 numbers for each word, and one linear
layer. Labels are ranked by the mean of their meta-classes' probabilities. All layers have one learning rate that falls
linearly to 2 %. It is tuned on the validation documents by the error of the best-ranked label.

    python -m benchmarks.extreme --workers 2                     # tune, three seeds, results/extreme.json
    python -m benchmarks.extreme --methods sparse_adam,default   # some of the methods
    python -m benchmarks.extreme --summarise                     # only results/extreme.json, from finished runs
"""

from __future__ import annotations

import functools
import time
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import debian, schedules
from benchmarks.command import run_command
from benchmarks.gcide import cache_folder
from benchmarks.mach import Classifier, loss_of, precision_and_recall, probabilities
from benchmarks.mach_methods import METHODS, build
from benchmarks.sparse_methods import state_bytes
from benchmarks.sweep import Cache, Result, Setting, Sweep, false_if_diverged

CLASSES = 1_024  # meta-classes
REPETITIONS = 4
WIDTH = 64
EPOCHS = 6
BATCH = 256
LAST_LR = 0.02  # of the first
PRECISION_AT = 1, 3, 5
RECALL_AT = 100

START_LR = {"adam": 16e-3, "sparse_adam": 16e-3, "adagrad": 0.2}
DEFAULT_EPS = {"adam": 1e-8, "sparse_adam": 1e-8, "adagrad": 1e-10}
NAMES = [name for name in METHODS if not name.startswith("default_")]  # whose layers are the default's here


def run(setting: Setting) -> Result:
    """Train once; the validation error (None if it diverged), figures on the test documents, state bytes, seconds."""
    began = time.perf_counter()
    method, data = METHODS[setting.method], _data()
    torch.manual_seed(setting.seed)
    random = np.random.default_rng(setting.seed)
    hashes = torch.from_numpy(random.integers(CLASSES, size=(REPETITIONS, data.labels)))
    model = nn.ModuleList(Classifier(debian.BUCKETS, WIDTH, CLASSES, sparse=method.sparse) for _ in range(REPETITIONS))
    optimizers = build(method, model, lr=setting.lr)
    finite = _train(model, optimizers, data.train, hashes, random, setting.lr)
    trained = time.perf_counter()
    valid = evaluate(model, data.valid, hashes) if finite else None
    return {
        "valid": None if valid is None else 1 - valid["P@1"],
        "test": evaluate(model, data.test, hashes) if finite else None,
        "state_bytes": sum(state_bytes(optimizer) for optimizer in optimizers),
        "seconds": {"train": trained - began, "all": time.perf_counter() - began},
    }


@false_if_diverged
def _train(
    model: nn.ModuleList,
    optimizers: list[Any],
    part: debian.Part,
    hashes: Tensor,
    random: np.random.Generator,
    lr: float,
) -> bool:
    """All steps; False if the run diverged."""
    each = len(part.words) // BATCH
    for epoch in range(EPOCHS):
        order = random.permutation(len(part.words))
        for step in range(each):
            share = schedules.linear(epoch * each + step, EPOCHS * each, last=LAST_LR)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = share * lr
            ids, starts, label, document, weight = _batch(part, order[step * BATCH : (step + 1) * BATCH])
            for classifier, classes in zip(model, hashes, strict=True):
                loss = loss_of(classifier(ids, starts), document, classes[label], weight)
                loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@torch.no_grad()
def evaluate(model: nn.ModuleList, part: debian.Part, hashes: Tensor) -> dict[str, float]:
    """Precision and recall, the mean over documents."""
    figures: dict[str, list[float]] = {}
    for documents in np.array_split(np.arange(len(part.words)), len(part.words) // BATCH):
        ids, starts, label, document, _ = _batch(part, documents)
        scored = probabilities([classifier(ids, starts) for classifier in model], hashes)
        own = list(torch.split(label, document.bincount().tolist()))
        for name, values in precision_and_recall(scored, own, precision_at=PRECISION_AT, recall_at=RECALL_AT).items():
            figures.setdefault(name, []).extend(values)
    return {name: mean(values) for name, values in figures.items()}


def _batch(part: debian.Part, documents: debian.Ids) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Words and where each document's start; labels, the document of each, and one divided by how many it has."""
    words, labels = part.words.take(documents), part.labels.take(documents)
    counts = np.diff(labels.starts)
    document = np.repeat(np.arange(len(documents)), counts)
    weight = np.repeat(1 / counts, counts).astype(np.float32)
    arrays = words.ids, words.starts[:-1], labels.ids, document, weight
    ids, starts, label, of, share = (torch.from_numpy(array) for array in arrays)
    return ids, starts, label, of, share


@functools.lru_cache(maxsize=1)
def _data() -> debian.Packages:
    return debian.load()


def main() -> None:
    families = {name: METHODS[name].family for name in NAMES}
    searches = {name: (START_LR[family], [DEFAULT_EPS[family]]) for name, family in families.items()}
    sweep = Sweep(run, Cache(cache_folder() / "extreme.jsonl"), searches)
    run_command("extreme", __doc__, sweep, {name: METHODS[name].label for name in NAMES}, prepare=_data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
