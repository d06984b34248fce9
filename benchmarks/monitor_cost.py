"""What a monitor costs for a table of 100,000 x 256: operations, bytes and time of a step.

    python -m benchmarks.monitor_cost            # counts, and times, for an idle machine
    python -m benchmarks.monitor_cost --count    # counts only
    python -m benchmarks.monitor_cost --device cuda

Of a step that makes no figures, and spread over all steps those that do. Operations are calls that a device would
launch a kernel for. Bytes are what they read and write, of selected rows these rows alone; they are compared with the
least that a step of the optimizer moves: gradient read, parameter and states read and written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sketch import CountSketch, Monitor, Policy, Rule, compress, report
from lightning_sketch.text import human_bytes, table

ROWS, WIDTH = 100_000, 256
TOUCHED = 4_096  # rows of a sparse gradient
WARM_UP, ROUNDS = 3, 30
METHODS: dict[str, dict[str, Any]] = {
    "Drop, Factored": {"first_moment": "Drop", "second_moment": "Factored"},
    "BFloat16, RowWise": {"first_moment": "BFloat16", "second_moment": "RowWise"},
    "CountSketch(20), both": {"first_moment": CountSketch(20), "second_moment": CountSketch(20)},
}
#: Operations that move nothing, and those that read the rows that they select alone.
VIEWS = ("view", "expand", "slice", "select", "detach", "reshape", "unsqueeze", "alias", "unbind", "t.", "_unsafe_view")
SELECTS = ("index_select", "index.Tensor", "searchsorted")


class Counter(TorchDispatchMode):
    """Counts operations, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.operations += 1
            made = sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
            given = sum(x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.bytes += 2 * made if name.startswith(SELECTS) else made + given
        return out


def optimizer_of(codecs: dict[str, Any], *, sparse: bool, device: str, monitor: Monitor | None) -> Any:
    """An optimizer of one table with a gradient."""
    torch.manual_seed(0)
    model = nn.Embedding(ROWS, WIDTH, sparse=sparse, device=device)
    policy = Policy([Rule(role="embedding", **codecs)])
    optimizer = compress(torch.optim.AdamW(model.parameters(), weight_decay=0.0), model, policy, monitor=monitor)
    if sparse:
        rows = torch.randperm(ROWS)[:TOUCHED].sort().values.to(device)
        values = torch.randn(TOUCHED, WIDTH, device=device)
        grad = torch.sparse_coo_tensor(rows[None], values, (ROWS, WIDTH), is_coalesced=True, check_invariants=False)
        model.weight.grad = grad
    else:
        model.weight.grad = torch.randn(ROWS, WIDTH, device=device)
    optimizer.model = model  # which owns the parameter
    return optimizer


def counts(optimizer: Any, steps: int) -> Counter:
    """What the optimizer's watcher does in so many steps."""
    counter, watcher = Counter(), optimizer.compression.watcher
    before, after = watcher.before, watcher.after

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with counter:
                return call(*args)

        return run

    watcher.before, watcher.after = counted(before), counted(after)
    for _ in range(steps):
        optimizer.step()
    watcher.before, watcher.after = before, after
    return counter


def moved(optimizer: Any, *, sparse: bool) -> float:
    """The least bytes that a step moves: gradient, parameter and states."""
    share = TOUCHED / ROWS if sparse else 1.0
    return 4 * ROWS * WIDTH * 3 * share + 2 * report(optimizer).state * share


def held(monitored: Any) -> int:
    """Bytes that the monitor keeps from step to step."""
    shadows = monitored.compression.watcher.shadows.values()
    return sum(x.nbytes for shadow in shadows for x in (shadow.rows, *shadow.states.values()))


def seconds(optimizers: list[Any], device: str) -> list[float]:
    """Median time of a step of each, which take turns."""

    def wait() -> None:
        if device != "cpu":
            torch.get_device_module(device).synchronize()

    times: list[list[float]] = [[] for _ in optimizers]
    for round_ in range(WARM_UP + ROUNDS):
        for optimizer, measured in zip(optimizers, times, strict=True):
            wait()
            began = time.perf_counter()
            optimizer.step()
            wait()
            if round_ >= WARM_UP:
                measured.append(time.perf_counter() - began)
    return [median(each) for each in times]


def rows_of_table(device: str, *, timed: bool) -> Iterator[tuple[str, ...]]:
    for name, codecs in METHODS.items():
        for sparse in (False, True):
            every = 100
            monitored = optimizer_of(codecs, sparse=sparse, device=device, monitor=Monitor(every=every))
            monitored.step()  # rows are chosen
            plain = counts(monitored, 1)
            many = counts(monitored, every)  # with figures once
            cells = [
                f"{name}{', sparse' if sparse else ''}",
                str(plain.operations),
                f"{many.operations / every:.1f}",
                f"{many.bytes / every / moved(monitored, sparse=sparse):.2%}",
                human_bytes(held(monitored)),
                f"{held(monitored) / (4 * ROWS * WIDTH):.2%}",
            ]
            if timed:
                both = [
                    optimizer_of(codecs, sparse=sparse, device=device, monitor=m) for m in (None, Monitor(every=every))
                ]
                without, with_ = seconds(both, device)
                cells += [f"{1e3 * without:.2f}", f"{1e6 * (with_ - without):.0f}", f"{with_ / without - 1:.1%}"]
            yield tuple(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="no times")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    columns = ["states", ">operations", ">with figures", ">bytes moved", ">held", ">of the table"]
    if not options.count:
        columns += [">step, ms", ">monitor, us", ">of the step"]
    print(
        table(
            f"a monitor of {ROWS:,} x {WIDTH}", tuple(columns), rows_of_table(options.device, timed=not options.count)
        )
    )


if __name__ == "__main__":
    main()
