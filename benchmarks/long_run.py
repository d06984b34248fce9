"""How far second moments of compressed states are from exact ones, up to step 100,000 and beyond.

A small language model (20,001 words, width 16, four words of context, sampled softmax) is trained once; the gradients
of its embedding in the last 3,000 of 4,000 steps are recorded: about 300 rows each, with their ids and values. This
record is then replayed, in another order each time, into the states alone, all of them side by side. At steps 1, 10,
100, ... what each would have divided the step by is compared with the exact number: over the rows of that step and of
the ones before (a tenth as many as were made, 50 at most), so that rows weigh by how often they are touched.

    python -m benchmarks.long_run                      # 100,000 steps -> results/long_run.json
    python -m benchmarks.long_run --steps 1000000      # ten times as long, and another column

Exact are the means of dense optimizers, which decay in every step (beta2 = 0.999), and Adagrad's sums. The paper's rule
decays touched rows alone, so it is compared with a mean that does so, too (`touched`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, SparseAdam

from benchmarks import gcide
from benchmarks.losses import sampled_softmax_loss
from benchmarks.sparse_lm import draw_negatives
from benchmarks.summary import RESULTS, environment
from lightning_sketch import SM3, Codec, CountSketch, Factored, RowWise
from lightning_sketch.codecs import CodecState, StateSpec, allocate
from lightning_sketch.codecs.decay import decayed
from lightning_sketch.sharding import Block, Shard

WORDS = 20_000
WIDTH = 16
CONTEXT = 4
BATCH = 200  # words to be foretold; their contexts have about 300 distinct words
TRAINED, RECORDED = 4_000, 3_000  # steps
LR = 8e-3
DECAY = {"first": 0.9, "second": 0.999, "sum": 1.0}
WINDOW = 50  # steps that are compared, at most
SEED = 0

Moment = Literal["first", "second", "sum"]
Record = list[tuple[Tensor, Tensor]]  # of each step the row ids [k], ascending, and gradients [k, 16]


@dataclass(frozen=True)
class Case:
    """A codec and what it is to hold."""

    label: str
    moment: Moment
    codec: Codec
    exact: Literal["dense", "touched"] = "dense"


def _cases() -> dict[str, Case]:
    """Every sketch by the package's and by the paper's rule, with and without cleaning, and the states beside them."""
    cases: dict[str, Case] = {}
    for size in (5, 20):
        sketch = f"CountSketch {size}x"
        plain, paper = CountSketch(compression=size), CountSketch(compression=size, update="paper")
        # The paper's MegaFace runs: times 0.2 every 125 steps; its released code: times 0.25 every 1,000.
        cleaned: dict[str, Any] = {"compression": size, "cleaning_interval": 125, "cleaning_factor": 0.2}
        cases[f"linear{size}"] = Case(sketch, "second", plain)
        cases[f"linear{size}_clean"] = Case(f"{sketch}, cleaned (0.2 every 125)", "second", CountSketch(**cleaned))
        for exact in ("dense", "touched"):
            end = "" if exact == "dense" else ", beside a mean of touched rows alone"
            tag = "" if exact == "dense" else "_touched"
            cases[f"paper{size}{tag}"] = Case(f"{sketch}, the paper's rule{end}", "second", paper, exact)
        cases[f"paper{size}_clean"] = Case(
            f"{sketch}, the paper's rule, cleaned (0.2 every 125)", "second", CountSketch(**cleaned, update="paper")
        )
    cases["paper5_code"] = Case(
        "CountSketch 5x, the paper's rule, cleaned (0.25 every 1,000)",
        "second",
        CountSketch(compression=5, update="paper", cleaning_interval=1_000, cleaning_factor=0.25),
    )
    for name, label, codec in (
        ("rows", "RowWise", RowWise()),
        ("rows10", "RowWise in a 10x sketch", RowWise(compression=10)),
        ("rows100", "RowWise in a 100x sketch", RowWise(compression=100)),
        ("factored", "Factored", Factored()),
        ("sm3", "SM3-II", SM3()),
        ("sm3_1", "SM3-I", SM3("I")),
    ):
        cases[name] = Case(label, "second", codec)
        cases[f"sum_{name}"] = Case(label, "sum", codec)
    cases["sum_sketch5"] = Case("CountSketch 5x", "sum", CountSketch(compression=5))
    cases["sum_sketch20"] = Case("CountSketch 20x", "sum", CountSketch(compression=20))
    cases["sum_sketch5_clean"] = Case(
        "CountSketch 5x, cleaned (0.5 every 125)",
        "sum",
        CountSketch(compression=5, cleaning_interval=125, cleaning_factor=0.5),
    )
    for size in (5, 20):
        first, signed = CountSketch(compression=size), CountSketch(compression=size, update="paper")
        cases[f"first_linear{size}"] = Case(f"CountSketch {size}x", "first", first)
        cases[f"first_paper{size}"] = Case(f"CountSketch {size}x, the paper's rule", "first", signed)
        cases[f"first_paper{size}_touched"] = Case(
            f"CountSketch {size}x, the paper's rule, beside a mean of touched rows alone", "first", signed, "touched"
        )
    return cases


CASES = _cases()


class Exact:
    """A mean or sum of every row, ``[rows, 16]``; if `lazy`, rows decay in the steps that touch them."""

    def __init__(self, moment: Moment, lazy: bool) -> None:
        self.decay, self.lazy = DECAY[moment], lazy
        self.values = torch.zeros(WORDS + 1, WIDTH, dtype=torch.float64)
        self.scale = 1.0

    def step(self, rows: Tensor, x: Tensor) -> Tensor:
        """The values of these rows after the step, ``[k, 16]``."""
        weight = 1 - self.decay if self.decay < 1 else 1.0
        if self.lazy:
            new = self.values[rows] * self.decay + x * weight
        else:
            self.scale = decayed(self.scale, self.decay, (self.values,))
            new = self.values[rows] + x * (weight / self.scale)
        self.values[rows] = new
        return new * self.scale


class Shadow:
    """One codec's state, which is given all gradients."""

    def __init__(self, case: Case) -> None:
        signed = case.moment == "first"
        self.case, shard = case, Shard.whole((WORDS + 1, WIDTH))
        spec = StateSpec(
            name="exp_avg" if signed else "exp_avg_sq",
            fqn="words.weight",
            signed=signed,
            shard=shard,
            seed=SEED,
            dtype=torch.float32,
            param_dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.tensors: dict[str, Any] = allocate(case.codec, spec)
        self.state: CodecState = case.codec.bind(spec, self.tensors)
        table = case.codec.table_shape(shard) or case.codec.row_table_shape(shard)
        self.numbers = sum(value.numel() for value in self.tensors.values() if value.ndim)
        self.table = None if table is None else [*table, *([WIDTH] if case.codec.table_shape(shard) else [])]

    def step(self, step: int, block: Block, rows: Tensor, x: Tensor, *, reads: bool) -> Tensor | None:
        """One step; the estimate that an optimizer would go by, ``[k, 16]``, if it `reads` it."""
        decay = DECAY[self.case.moment]
        state = self.state
        state.begin(decay=decay, weight=1 - decay if decay < 1 else 1.0, step=step, rows=rows)
        state.add(block, x)
        state.settle()
        found = state.read(block, x) if reads or state.reads_values else None
        state.commit()
        return found

    @property
    def largest(self) -> float:
        """The largest number that is stored."""
        return max(float(v.abs().max()) for v in self.tensors.values() if v.ndim) * float(
            next((v for k, v in self.tensors.items() if k.endswith("scale")), 1.0)
        )


def record() -> Record:
    """The embedding's gradients in the last steps of a training."""
    corpus = gcide.load(max_words=WORDS)
    random = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    words, scored = nn.Embedding(WORDS + 1, WIDTH, sparse=True), nn.Embedding(WORDS + 1, WIDTH, sparse=True)
    mix = nn.Linear(CONTEXT * WIDTH, WIDTH)
    nn.init.normal_(words.weight, std=0.1)
    nn.init.normal_(scored.weight, std=0.1)
    tables: Optimizer = SparseAdam([words.weight, scored.weight], lr=LR)
    hidden: Optimizer = Adam(mix.parameters(), lr=1e-3)
    negatives, log_expected = draw_negatives(corpus.counts, TRAINED, random)
    text = torch.from_numpy(corpus.train.reshape(-1).astype(np.int64))
    found: Record = []
    for step in range(TRAINED):
        places = torch.from_numpy(random.integers(CONTEXT, len(text), BATCH))
        context = torch.stack([text[places - back] for back in range(CONTEXT, 0, -1)], 1)
        target, drawn = text[places], negatives[step]
        rows = scored(torch.cat([target, drawn]))
        features = mix(words(context).flatten(1))
        sampled_softmax_loss(features, rows[:BATCH], rows[BATCH:], target, drawn, log_expected).backward()  # type: ignore[no-untyped-call]
        gradient = words.weight.grad
        assert gradient is not None
        gradient = gradient.coalesce()
        if step >= TRAINED - RECORDED:
            found.append((gradient.indices()[0].clone(), gradient.values().clone()))
        for optimizer in (tables, hidden):
            optimizer.step()
            optimizer.zero_grad()
    return found


def replay(recorded: Record, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The record over and over, each time in another order."""
    random = np.random.default_rng(SEED + 1)
    for start in range(0, steps, len(recorded)):
        order = random.permutation(len(recorded))[: steps - start]
        yield from (recorded[at] for at in order)


def checkpoints(steps: int) -> dict[int, list[int]]:
    """The steps that are reported, 1, 10, 100, ..., and those that are compared for each."""
    found, at = {}, 1
    while at <= steps:
        found[at] = list(range(max(1, at - min(WINDOW - 1, at // 10)), at + 1))
        at *= 10
    return found


def compare(found: Tensor, exact: Tensor, moment: Moment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By row: the relative error, the factor by which the step is off (log2), both ``[k]``, and squares of both sides.

    Args:
        found, exact: broadcastable to ``[k, 16]``; `exact` is above 0 where it is not a first moment.
    """
    found = found.double().expand_as(exact)
    error = (found - exact).abs().sum(1) / exact.abs().sum(1)
    squares = (found - exact).square().sum(), exact.square().sum()
    if moment == "first":
        return error, torch.zeros_like(error), *squares
    known = exact > 0
    off = torch.where(known & (found > 0), 0.5 * torch.log2(found / exact), 0.0)
    return error, off.sum(1) / known.sum(1), *squares


def run(recorded: Record, steps: int) -> dict[str, Any]:
    """All cases over `steps` steps."""
    shadows = {name: Shadow(case) for name, case in CASES.items() if not name.endswith("_touched")}
    exact = {(case.moment, case.exact): Exact(case.moment, case.exact == "touched") for case in CASES.values()}
    shard = Shard.whole((WORDS + 1, WIDTH))
    reported = checkpoints(steps)
    compared = {step: at for at, window in reported.items() for step in window}
    gathered: dict[tuple[str, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
    largest: dict[str, dict[int, float]] = {name: {} for name in shadows}
    for step, (rows, gradient) in enumerate(replay(recorded, steps), start=1):
        block = Block(shard, rows, slice(0, len(rows)))
        squares = gradient.square()
        true = {key: state.step(rows, gradient if key[0] == "first" else squares) for key, state in exact.items()}
        at = compared.get(step)
        for name, shadow in shadows.items():
            case = shadow.case
            x = gradient if case.moment == "first" else squares
            estimate = shadow.step(step, block, rows, x, reads=at is not None)
            if at is None or estimate is None:
                continue
            for other in (name, f"{name}_touched"):
                if other in CASES:
                    key = case.moment, CASES[other].exact
                    gathered.setdefault((other, at), []).append(compare(estimate, true[key], case.moment))
        if step in reported:
            for name, shadow in shadows.items():
                largest[name][step] = shadow.largest
            print(f"step {step:,}", flush=True)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        shadow = shadows[name.removesuffix("_touched")]
        found[name] = {
            "label": case.label,
            "moment": case.moment,
            "codec": repr(case.codec),
            "table": shadow.table,
            "numbers": shadow.numbers,
            "at": {
                str(at): summarised(gathered[name, at]) | {"largest": largest[name.removesuffix("_touched")][at]}
                for at in reported
            },
        }
    return found


def summarised(compared: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Figures over all compared rows, a row as often as it was touched."""
    error, off = (torch.cat([each[i] for each in compared]) for i in (0, 1))
    difference, size = (sum(float(each[i]) for each in compared) for i in (2, 3))
    return {
        "median_error": float(error.median()),
        "rms_error": math.sqrt(difference / size),
        "step_factor": float(2 ** off.abs().mean()),
        "step_bias": float(2 ** -off.mean()),  # of the step's length: below 1 where the moment is too large
        "step_spread": float(2 ** (off - off.mean()).abs().mean()),  # what another learning rate cannot make up for
        "rows": len(error),
    }


def table(stored: dict[str, Any], moment: Moment, figure: str) -> str:
    """One figure of all cases that hold a moment, by step."""
    cases = {name: case for name, case in stored["cases"].items() if case["moment"] == moment}
    steps = [int(step) for step in next(iter(cases.values()))["at"]]
    lines = [
        f"| state | table | numbers | {' | '.join(f'step {step:,}' for step in steps)} |",
        f"|---|---|---|{'---|' * len(steps)}",
    ]
    for case in cases.values():
        shape = "" if case["table"] is None else str(case["table"])
        values = [f"{case['at'][str(step)][figure]:.3g}" for step in steps]
        lines.append(f"| {case['label']} | {shape} | {case['numbers']:,} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    began = time.process_time()
    recorded = record()
    prepared = time.process_time()
    cases = run(recorded, steps)
    stored = {
        "environment": environment(),
        "steps": steps,
        "rows_a_step": sum(len(rows) for rows, _ in recorded) / len(recorded),
        "cpu_seconds": {"record": prepared - began, "replay": time.process_time() - prepared},
        "cases": cases,
    }
    path = RESULTS / "long_run.json"
    path.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{steps:,} steps, {time.process_time() - began:.0f} s of a CPU -> {path}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
