"""The tables of docs/quality.md about the usual recipe, from ``results/usual_recipe.json``.

python -m benchmarks.usual_recipe_tables
"""

from __future__ import annotations

import json
import math
from typing import Any

from benchmarks.make_tables import PAGE, percent, replace_between, share
from benchmarks.summary import RESULTS
from benchmarks.sweep import Result, perplexity
from benchmarks.usual_recipe import METHODS

Runs = dict[str, list[Result]]


def usual_recipe_tables(results: list[Result]) -> dict[str, str]:
    """Both tables, by the name of their marks."""
    runs: Runs = {name: [] for name in METHODS}
    for result in results:
        runs[result["setting"]["method"]].append(result)
    return {f"usual_{kind}": _table({n: found for n, found in runs.items() if n.startswith(kind)}) for kind in KINDS}


KINDS = ("tied", "untied")


def _table(runs: Runs) -> str:
    """Every method at the best learning rate tried for it, all of which are shown."""
    kind = next(iter(runs)).split("_")[0]
    lines = [
        "| what is compressed | state | test perplexity | against exact | against exact, beta1 = 0 "
        "| lr | valid by lr |",
        "|---|---|---|---|---|---|---|",
    ]
    references = [_at_best(runs[f"{kind}_{name}"]) for name in ("adamw", "b0")]
    exact = runs[f"{kind}_adamw"]
    for name, own in runs.items():
        if own and exact:
            best = _at_best(own)
            tested = [result["test"] for result in best.values() if result["test"]]
            columns = [METHODS[name].label, share(own[0], exact[0]), _mean_and_range(tested)]
            columns += ["" if best == reference else _against(best, reference) for reference in references]
            columns += [f"{_rate(next(iter(best.values()))):g}", _tried(own)]
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _at_best(own: list[Result]) -> dict[int, Result]:
    """By seed, the runs at the rate that is best on validation with seed 0."""
    first = [result for result in own if result["setting"]["seed"] == 0]
    if not first:
        return {}
    best = _rate(min(first, key=perplexity))
    return {result["setting"]["seed"]: result for result in own if _rate(result) == best}


def _against(own: dict[int, Result], reference: dict[int, Result]) -> str:
    seeds = sorted(own.keys() & reference.keys())
    ratios = [own[seed]["test"] / reference[seed]["test"] for seed in seeds if own[seed]["test"]]
    return percent(ratios) if ratios else "-"


def _mean_and_range(values: list[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.2f}" + (f" ({min(values):.2f}-{max(values):.2f}, {len(values)} seeds)" if len(values) > 1 else "")


def _tried(own: list[Result]) -> str:
    by_rate = {_rate(result): perplexity(result) for result in own if result["setting"]["seed"] == 0}
    return ", ".join(f"{rate:g}: {_number(value)}" for rate, value in sorted(by_rate.items()))


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "diverged"


def _rate(result: dict[str, Any]) -> float:
    return float(f"{result['setting']['lr']:.6g}")


def main() -> None:
    stored = json.loads((RESULTS / "usual_recipe.json").read_text())
    text = PAGE.read_text()
    for name, made in usual_recipe_tables(stored["runs"]).items():
        text = replace_between(text, name, made, PAGE.name)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
