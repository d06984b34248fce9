"""Which axes of exact second moments may share a number: signal to noise by layer type, over a training.

For every matrix of exact AdamW's second moments V in a training by :mod:`benchmarks.usual_recipe`: mean(V)**2 / var(V)
within each row, averaged over the rows; within each column, averaged over the columns; and within the whole matrix
(SlimAdam, arXiv 2503.01843). Above 1, one number does for what is shared. Beside it the root mean square of
sqrt(V / shared) - 1: how far steps come out wrong that the exact V would have made of length 1, when V is shared by
rows, by columns, or as the product of both (`Factored`).

    python -m benchmarks.second_moments --methods tied_adamw --seed 1   # results/second_moments.json
    python -m benchmarks.second_moments --methods untied_adamw
    python -m benchmarks.second_moments --methods ''               # only write and print it, from finished runs

A run counts as one of the usual recipe's, too.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gcide import cache_folder
from benchmarks.summary import RESULTS
from benchmarks.sweep import Setting, each
from benchmarks.usual_recipe import BETAS, EPS, METHODS, cache, run

PREFIX = "second_moments_"  # of files in the cache
SNAPSHOTS = (1, 10, 100, 200, 500, 1_000, 1_500, 2_000)  # steps
TINY = 1e-30  # columns and rows of words that never came are left out


def measure(name: str, *, lr: float, seed: int) -> None:
    """Train once and keep what was found beside the other finished runs."""
    path = cache_folder() / f"{PREFIX}{name}.json"
    if path.exists():
        return
    found: dict[str, dict[str, Any]] = {}

    def watch(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        if step in SNAPSHOTS:
            correction = 1 - BETAS[1] ** step
            for of, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    found.setdefault(of, {})[str(step)] = ratios(optimizer.state[parameter]["exp_avg_sq"] / correction)

    setting = Setting(name, lr, EPS, seed)
    result = run(setting, watch)
    if cache().find(setting) is None:
        cache().add(setting, result)
    path.write_text(json.dumps({"label": METHODS[name].label, "lr": lr, "seed": seed, "layers": found}))


def ratios(second_moment: Tensor) -> dict[str, float]:
    """Signal to noise within rows, columns and all of ``[rows, columns]``; errors of steps when V is shared so.

    >>> ratios(torch.ones(2, 3))["rows_error"]
    0.0
    """
    v = second_moment.double()
    v = v[v.amax(1) > TINY]
    row, column = v.mean(1, keepdim=True), v.mean(0, keepdim=True)
    factored = row * column / v.mean()
    return {
        "rows": _snr(v, 1),
        "columns": _snr(v, 0),
        "all": _snr(v.flatten(), 0),
        "rows_error": _error(v, row),
        "columns_error": _error(v, column),
        "factored_error": _error(v, factored),
    }


def _snr(v: Tensor, axis: int) -> float:
    return float((v.mean(axis).square() / v.var(axis).clamp_min(TINY**2)).clamp_max(1e6).mean())


def _error(v: Tensor, shared: Tensor) -> float:
    return float((v / shared.clamp_min(TINY)).sqrt().sub(1).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="tied_adamw,untied_adamw", help="exact methods of usual_recipe, or none")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    arguments = parser.parse_args()
    names = arguments.methods.split(",") if arguments.methods else []
    each(functools.partial(measure, lr=arguments.lr, seed=arguments.seed), names, workers=arguments.workers)
    kept = sorted(cache_folder().glob(f"{PREFIX}*.json"))
    found = {path.stem.removeprefix(PREFIX): json.loads(path.read_text()) for path in kept}
    (RESULTS / "second_moments.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def table(found: dict[str, dict[str, Any]]) -> str:
    """Means over the snapshots, and the first and the last; layers of one type together."""
    lines = [
        "| layer | V shared within a row | within a column | within all "
        "| update off by: a number a row | a column | Factored |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, stored in found.items():
        types: dict[str, list[dict[str, dict[str, float]]]] = {}
        for name, by_step in stored["layers"].items():
            parts = name.split(".")
            types.setdefault(".".join(part for part in parts if not part.isdigit()), []).append(by_step)
        for name, layers in types.items():
            cells = [_over_time(layers, key) for key in ("rows", "columns", "all")]
            cells += [_last(layers, f"{key}_error") for key in ("rows", "columns", "factored")]
            lines.append(f"| {kind.split('_')[0]}: `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_time(layers: list[dict[str, dict[str, float]]], key: str) -> str:
    steps = sorted(layers[0], key=int)
    means = [sum(layer[step][key] for layer in layers) / len(layers) for step in steps]
    return f"{sum(means) / len(means):.2g} ({means[0]:.2g} -> {means[-1]:.2g})"


def _last(layers: list[dict[str, dict[str, float]]], key: str) -> str:
    last = max(layers[0], key=int)
    return f"{100 * sum(layer[last][key] for layer in layers) / len(layers):.0f} %"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
