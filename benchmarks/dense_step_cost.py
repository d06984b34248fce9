"""What one step of a table costs under dense gradients: milliseconds and the most temporary bytes.

    python -m benchmarks.dense_step_cost

AdamW over one table of 50,000 x 256, float32. Each method steps in turn, round after round, so that a disturbance of
the machine hits all of them. Processor time of one thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import lightning_sketch as ls
from benchmarks.step_cost import compare

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
    "floored_drop": Method(
        "Factored(floor=1), no first moment", {}, {"exp_avg": ls.Drop(), "exp_avg_sq": ls.Factored(floor=1.0)}
    ),
    "sm3_drop": Method("SM3-II (EMA), no first moment", {}, {"exp_avg": ls.Drop(), "exp_avg_sq": ls.SM3()}),
    "cs20_drop": Method("CountSketch 20x, no first moment", {}, {"exp_avg": ls.Drop(), "exp_avg_sq": ls.CountSketch()}),
    "cs20_both": Method("CountSketch 20x, both moments", {}, {m: ls.CountSketch() for m in ("exp_avg", "exp_avg_sq")}),
    "bf16_both": Method("BFloat16, both moments", {}, {m: ls.BFloat16() for m in ("exp_avg", "exp_avg_sq")}),
}


def main() -> None:
    torch.set_num_threads(1)
    gradients = [(torch.randn(ROWS, COLUMNS),)]
    optimizers = {name: _make(method) for name, method in METHODS.items()}
    labels = {name: method.label for name, method in METHODS.items()}
    compare("dense_step_cost", optimizers, gradients, labels, reference="fused", warm_up=WARM_UP, rounds=ROUNDS)


def _make(method: Method) -> Optimizer:
    table = nn.Embedding(ROWS, COLUMNS)
    optimizer = AdamW(table.parameters(), lr=1e-4, **method.options)
    if method.codecs:
        ls.compress(optimizer, table, ls.Policy([ls.Rule(role="embedding", **method.codecs)]))
    optimizer.table = table  # type: ignore[attr-defined]  # the optimizer knows its model by weak reference
    return optimizer


if __name__ == "__main__":
    main()
