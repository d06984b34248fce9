"""Held-out perplexity where tables lie in row shards: by states that ranks agree on, and by each rank's own.

    nice python -m benchmarks.shards_quality            # -> results/shards_quality.json, docs/sharding.md
    python -m benchmarks.shards_quality --tables        # results/shards_quality.json -> docs/sharding.md

The language model of :mod:`benchmarks.sparse_lm`, cut: the 20,000 commonest words of 109,213, 500 steps of 2,000, no
search but a learning rate of 0.064 for all (at eps 1e-8 the best ones there are 0.032 to 0.128). Gradients are dense,
as FSDP2 has them, and all shards have the same ones: what differs is the optimizer of the tables alone. Words are
sorted by frequency, as in many vocabularies, so the first shard has the frequent rows.

- One process is an ordinary converted optimizer.
- Ranks that agree are simulated (:mod:`benchmarks.simulated_ranks`, which says why they are ranks).
- Ranks that do not are what version 0.1 had: each compresses its rows as if they were a table of their own. So they
  are: one optimizer has all shards as layers. Nothing else of a step knew of other ranks then.

Finished runs are kept as those of the other benchmarks. A run takes half a minute of one core, of 64 simulated ranks
two.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

import lightning_sketch as ls
from benchmarks import gcide, sparse_lm
from benchmarks.pages import DOCS, write_tables
from benchmarks.simulated_ranks import SimulatedRanks
from benchmarks.summary import RESULTS, environment
from benchmarks.sweep import Cache, Result, Setting

WORDS, STEPS = 20_000, 500
LR, EPS = 64e-3, 1e-8
SHARDS = (1, 2, 4, 8, 64)
#: Of one process and what is or was the default; everything else has the first.
SEEDS, DEFAULTS = (0, 1, 2), ("floored", "factored", "rw_10")
PAGE = DOCS / "sharding.md"

#: Codecs of the second moment: label, and what makes them. There is no first one (`Drop`), as by default.
CODECS: dict[str, tuple[str, Callable[[], ls.Codec]]] = {
    "floored": ("`Factored(floor=1)`", lambda: ls.Factored(floor=1.0)),
    "factored": ("`Factored()`", ls.Factored),
    "rw_10": ("`RowWise(compression=10)`", lambda: ls.RowWise(compression=10)),
    "rw": ("`RowWise()`", ls.RowWise),
    "cs20_sync": ("`CountSketch(20, sync=True)`", lambda: ls.CountSketch(20, sync=True)),
    "cs20": ("`CountSketch(20)`", lambda: ls.CountSketch(20)),
}
#: Codecs, and whether ranks agree, in the table's order, with the numbers of shards that are measured.
ROWS: dict[tuple[str, bool], tuple[int, ...]] = {
    ("floored", True): SHARDS,
    ("floored", False): SHARDS[1:],
    ("factored", True): SHARDS,
    ("factored", False): SHARDS[1:],
    ("rw_10", True): SHARDS,
    ("rw_10", False): SHARDS[1:],
    ("rw", True): (1, 64),
    ("cs20_sync", True): (1, 64),
    ("cs20", False): SHARDS[1:],  # of which the ranks share nothing
}


class Apart:
    """The tables' optimizer of ranks that share nothing: shards are layers of one optimizer."""

    def __init__(self, tables: Mapping[str, nn.Parameter], ranks: int, make: Callable[[nn.Module], Optimizer]) -> None:
        self.tables = list(tables.values())
        self.shards = [[nn.Parameter(rows) for rows in table.detach().chunk(ranks)] for table in self.tables]
        self.optimizer = make(nn.ParameterList(shard for shards in self.shards for shard in shards))
        self.param_groups = self.optimizer.param_groups

    def step(self) -> None:
        for table, shards in zip(self.tables, self.shards, strict=True):
            for shard, grad in zip(shards, table.grad.chunk(len(shards)), strict=True):  # type: ignore[union-attr]
                shard.grad = grad
        self.optimizer.step()

    def zero_grad(self) -> None:
        for table in self.tables:
            table.grad = None


def run(setting: Setting) -> Result:
    """Train once: perplexities and seconds."""
    codecs, shards, agree = parts_of(setting.method)
    torch.manual_seed(setting.seed)
    corpus = _corpus()
    model = sparse_lm.Model(corpus.vocabulary)
    model.words.sparse = model.softmax.sparse = False
    tables = {"words": model.words.weight, "softmax": model.softmax.weight}
    policy = ls.Policy([ls.Rule(name="*", exp_avg=ls.Drop(), exp_avg_sq=CODECS[codecs][1]())])

    def make(module: nn.Module) -> Optimizer:
        return ls.compress(Adam(module.parameters(), lr=setting.lr, eps=setting.eps), module, policy)

    began = time.perf_counter()
    optimizer: Any
    if shards == 1:
        optimizer = make(nn.ModuleDict({name: _module_of(table) for name, table in tables.items()}))
    elif agree:
        optimizer = SimulatedRanks(tables, shards, make)
    else:
        optimizer = Apart(tables, shards, make)
    finite = sparse_lm.train(model, optimizer, _batches(setting.seed), setting.lr)
    return {
        "valid": sparse_lm.perplexity_on(model, corpus.valid, sparse_lm.VALID_WORDS) if finite else None,
        "test": sparse_lm.perplexity_on(model, corpus.test, sparse_lm.TEST_WORDS) if finite else None,
        "seconds": time.perf_counter() - began,
    }


def _module_of(table: nn.Parameter) -> nn.Module:
    """Gives the table the name that simulated ranks know it by: hash seeds follow from names."""
    module = nn.Module()
    module.weight = table
    return module


def settings() -> list[Setting]:
    """All runs: those of one process first."""
    found = [
        Setting(method_of(codecs, shards, agree), LR, EPS, seed)
        for (codecs, agree), numbers in ROWS.items()
        for shards in numbers
        for seed in (SEEDS if shards == 1 and codecs in DEFAULTS else SEEDS[:1])
    ]
    order = (1, 64, 8, 2, 4)  # what matters most, first
    return sorted(found, key=lambda setting: order.index(parts_of(setting.method)[1]))


def method_of(codecs: str, shards: int, agree: bool) -> str:
    return f"{codecs}/{shards}/{'agreed' if agree else 'apart'}"


def parts_of(method: str) -> tuple[str, int, bool]:
    codecs, shards, agree = method.split("/")
    return codecs, int(shards), agree == "agreed"


def quality_table(runs: list[Result]) -> str:
    """Test perplexity by codecs and number of shards: of one process its mean and range over seeds."""
    by: dict[str, list[float]] = {}
    for each in runs:
        by.setdefault(each["setting"]["method"], []).append(each["test"])
    lines = [
        f"| second moment | ranks | one process ({len(SEEDS)} seeds) | "
        + " | ".join(f"{shards} shards" for shards in SHARDS[1:])
        + " |",
        "|---" * (2 + len(SHARDS)) + "|",
    ]
    for codecs, agree in ROWS:
        cells = []
        for shards in SHARDS:
            values = by.get(method_of(codecs, shards, agree), [])
            shown = f"{mean(values):.1f}" if values else ""
            cells.append(f"{shown} ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else shown)
        lines.append(f"| {CODECS[codecs][0]} | {'agree' if agree else 'each by itself'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(stored: dict[str, Any]) -> None:
    """Put the table into the page."""
    write_tables(PAGE, {"shards_quality": quality_table(stored["runs"])})


@functools.cache
def _corpus() -> gcide.Corpus:
    return gcide.load(max_words=WORDS)


@functools.lru_cache(maxsize=1)
def _batches(seed: int) -> sparse_lm.Batches:
    return sparse_lm.draw(_corpus(), seed, STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only write the table of docs/sharding.md")
    arguments = parser.parse_args()
    path = RESULTS / "shards_quality.json"
    if not arguments.tables:
        torch.set_num_threads(1)
        cache = Cache(gcide.cache_folder() / "shards_quality.jsonl")
        runs = [cache.run(setting, run) for setting in settings()]
        stored = {"environment": environment(), "words": WORDS, "steps": STEPS, "runs": runs}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    write_table(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
