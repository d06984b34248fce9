"""What a monitor shows of policies that train well, and of such as do not: a table of docs/monitor.md.

The language model of :mod:`benchmarks.sparse_lm`, 800 steps of SparseAdam at a learning rate of 0.064 for all policies;
figures of the last hundredth step, of the table at the softmax, whose figures are the worse.

    python -m benchmarks.monitor_figures             # results/monitor_figures.json -> docs/monitor.md; ten minutes
    python -m benchmarks.monitor_figures --tables    # only the last
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch

from benchmarks import sparse_lm
from benchmarks.pages import DOCS, write_tables
from benchmarks.summary import RESULTS
from lightning_sketch import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    Factored,
    Monitor,
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
)

STEPS = 800
EVERY = 100
LR = 0.064
HELD_OUT = 4_096  # words
PATH, PAGE = RESULTS / "monitor_figures.json", DOCS / "monitor.md"

#: First and second moment; ``None`` for exact states.
POLICIES: dict[str, tuple[Codec, Codec] | None] = {
    "exact": None,
    "`Drop`, `Factored(floor=1)`: the default": (Drop(), Factored(floor=1.0)),
    "`Drop`, `Factored()`": (Drop(), Factored()),
    "`Drop`, `RowWise()`": (Drop(), RowWise()),
    "`Drop`, `RowWise(10)`": (Drop(), RowWise(10)),
    "`BFloat16`, `Factored()`": (BFloat16(), Factored()),
    "`Quantized()` of both": (Quantized(), Quantized()),
    "`Quantized()`, `Quantized(bits=4)`": (Quantized(), Quantized(bits=4)),
    "`Drop`, `SM3`": (Drop(), SM3()),
    "`Drop`, `CountSketch(20)`": (Drop(), CountSketch(20)),
    "`CountSketch(5)` of both": (CountSketch(5), CountSketch(5)),
    "`CountSketch(20)` of both": (CountSketch(20), CountSketch(20)),
    "`CountSketch(100)` of both": (CountSketch(100), CountSketch(100)),
    "`CountSketch(1000)` of both": (CountSketch(1_000), CountSketch(1_000)),
    "`Drop`, `RowWise(1000)`": (Drop(), RowWise(1_000)),
}
FIGURES = ("exp_avg_error", "exp_avg_sq_error", "update_cosine", "update_norm_ratio")


def measure(codecs: tuple[Codec, Codec] | None) -> dict[str, Any]:
    """One training: its held-out loss in nats, and the last figures."""
    torch.manual_seed(0)
    corpus = sparse_lm._corpus()
    model = sparse_lm.Model(corpus.vocabulary)
    tables = torch.optim.SparseAdam([model.words.weight, model.softmax.weight], lr=LR)
    monitor = Monitor(every=EVERY)
    if codecs is not None:
        rule = Rule(name="*.weight", first_moment=codecs[0], second_moment=codecs[1])
        compress(
            tables,
            torch.nn.ModuleDict({"words": model.words, "softmax": model.softmax}),
            Policy([rule]),
            monitor=monitor,
        )
    finite = sparse_lm.train(model, tables, sparse_lm.draw(corpus, 0, STEPS), LR)
    perplexity = sparse_lm.perplexity_on(model, corpus.valid, HELD_OUT) if finite else None
    figures = monitor.figures() if codecs is not None else {}
    return {"loss": perplexity and math.log(perplexity)} | {
        key: figures.get(f"optimizer_state/softmax.weight/{key}") for key in FIGURES
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Losses to two places, figures to two digits."""
    heads = " | ".join(f"`{key}`" for key in FIGURES)
    lines = [f"| states | loss, held out | {heads} |", "|---" * (2 + len(FIGURES)) + "|"]
    for policy, row in found.items():
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.2f}"
        cells = ["" if row[key] is None else f"{row[key]:.2g}" for key in FIGURES]
        lines.append(f"| {' | '.join([policy, loss, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="train nothing")
    if not parser.parse_args().tables:
        found: dict[str, dict[str, Any]] = {}
        for policy, codecs in POLICIES.items():
            found[policy] = measure(codecs)
            print(policy, found[policy], flush=True)
        PATH.write_text(json.dumps(found, indent=1) + "\n")
    write_tables(PAGE, {"monitor_figures": table(json.loads(PATH.read_text()))})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
