"""What one step of a table costs under dense gradients: milliseconds and the most temporary bytes.

    python -m benchmarks.dense_step_cost

AdamW over one table of 50,000 x 256, float32. Each method steps in turn, round after round, so that a disturbance of
the machine hits all of them. Processor time of one thread.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import lightning_sketch as ls
from benchmarks.sparse_methods import state_bytes
from benchmarks.step_cost import step_time, transient
from benchmarks.summary import RESULTS

ROWS, COLUMNS = 50_000, 256
ROUNDS = 9
WARM_UP = 2


@dataclass(frozen=True)
class Method:
    """An implementation of AdamW, or codecs."""

    label: str
    options: dict[str, bool]
    codecs: dict[str, ls.Codec]


METHODS = {
    "fused": Method("AdamW(fused=True)", {"fused": True}, {}),
    "foreach": Method("AdamW(foreach=True)", {"foreach": True}, {}),
    "loop": Method("AdamW(foreach=False)", {"foreach": False}, {}),
    "rw_drop": Method("RowWise, no first moment", {}, {"exp_avg": ls.Drop(), "exp_avg_sq": ls.RowWise()}),
    "rw_bf16": Method("RowWise, first moment BFloat16", {}, {"exp_avg": ls.BFloat16(), "exp_avg_sq": ls.RowWise()}),
    "factored_drop": Method("Factored, no first moment", {}, {"exp_avg": ls.Drop(), "exp_avg_sq": ls.Factored()}),
    "sm3_drop": Method("SM3-II (EMA), no first moment", {}, {"exp_avg": ls.Drop(), "exp_avg_sq": ls.SM3()}),
    "cs20_drop": Method("CountSketch 20x, no first moment", {}, {"exp_avg": ls.Drop(), "exp_avg_sq": ls.CountSketch()}),
    "cs20_both": Method("CountSketch 20x, both moments", {}, {m: ls.CountSketch() for m in ("exp_avg", "exp_avg_sq")}),
    "bf16_both": Method("BFloat16, both moments", {}, {m: ls.BFloat16() for m in ("exp_avg", "exp_avg_sq")}),
}


def main() -> None:
    torch.set_num_threads(1)
    gradient = (torch.randn(ROWS, COLUMNS),)
    optimizers = {name: _make(method) for name, method in METHODS.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for i in range(WARM_UP + ROUNDS):
        for name, optimizer in optimizers.items():
            taken = step_time(optimizer, gradient)
            if i >= WARM_UP:
                milliseconds[name].append(taken)
    reference = statistics.median(milliseconds["fused"])
    rows: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        median = statistics.median(milliseconds[name])
        rows[name] = {
            "label": METHODS[name].label,
            "milliseconds": median,
            "ratio": median / reference,
            "transient_bytes": transient(optimizer, gradient),
            "state_bytes": state_bytes(optimizer),
        }
        print(f"{name:15} {median:7.1f} ms  {median / reference:5.2f}x  {rows[name]['transient_bytes']:>12,} B")
    stored = {"torch": torch.__version__, "cpu_threads": 1, "methods": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dense_step_cost.json").write_text(json.dumps(stored, indent=1) + "\n")


def _make(method: Method) -> Optimizer:
    table = nn.Embedding(ROWS, COLUMNS)
    optimizer = AdamW(table.parameters(), lr=1e-4, **method.options)
    if method.codecs:
        ls.compress(optimizer, table, ls.Policy([ls.Rule(role="embedding", **method.codecs)]))
    optimizer.table = table  # type: ignore[attr-defined]  # the optimizer knows its model by weak reference
    return optimizer


if __name__ == "__main__":
    main()
