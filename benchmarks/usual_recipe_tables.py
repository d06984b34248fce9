"""The tables of docs/quality.md about the usual recipe: ``results/usual_recipe.json``, ``results/second_moments.json``.

python -m benchmarks.usual_recipe_tables
"""

from __future__ import annotations

import json
import math
from typing import Any

from benchmarks import second_moments
from benchmarks.make_tables import PAGE, against, share
from benchmarks.make_tables import perplexity as tested
from benchmarks.pages import write_tables
from benchmarks.summary import RESULTS
from benchmarks.sweep import Result, over_seeds, perplexity
from benchmarks.usual_recipe import METHODS

Runs = dict[str, list[Result]]


KINDS = ("tied", "untied")


def tables() -> dict[str, str]:
    """All, by the name of their marks."""
    stored = json.loads((RESULTS / "usual_recipe.json").read_text())
    moments = json.loads((RESULTS / "second_moments.json").read_text())
    return usual_recipe_tables(stored["runs"]) | {"second_moments": second_moments.table(moments)}


def usual_recipe_tables(results: list[Result]) -> dict[str, str]:
    """Both tables, by the name of their marks."""
    return {f"usual_{kind}": _table(_by_method(results, kind), kind) for kind in KINDS}


def rows(results: list[Result], kind: str) -> dict[str, dict[str, Any]]:
    """Methods with their states' bytes and what they came to at the best rate, by name.

    Args:
        kind: one of `KINDS`.
    """
    return {
        name: {"label": METHODS[name].label, "state_bytes": own[0]["state_bytes"], "best": _at_best(own)}
        for name, own in _by_method(results, kind).items()
    }


def _by_method(results: list[Result], kind: str) -> Runs:
    """The runs of each method that has any."""
    runs: Runs = {name: [] for name in METHODS if name.startswith(f"{kind}_")}
    for result in results:
        if result["setting"]["method"] in runs:
            runs[result["setting"]["method"]].append(result)
    return {name: own for name, own in runs.items() if own}


def _table(runs: Runs, kind: str) -> str:
    """Every method at the best learning rate tried for it, all of which are shown."""
    lines = [
        "| what is compressed | state | test perplexity | against exact | against exact, beta1 = 0 "
        "| lr | valid by lr |",
        "|---|---|---|---|---|---|---|",
    ]
    exact, no_first_moment = runs[f"{kind}_adamw"], runs[f"{kind}_b0"]
    references = [_at_best(own) for own in (exact, no_first_moment)]
    for name, own in runs.items():
        best = _at_best(own)
        columns = [METHODS[name].label, share(own[0], exact[0]), tested(best)]
        columns += ["" if best == reference else against(best, reference) for reference in references]
        columns += [f"{best['lr']:g}", _tried(own)]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _at_best(own: list[Result]) -> dict[str, Any]:
    """What was found at the rate that is best on validation with seed 0."""
    best = min((result for result in own if result["setting"]["seed"] == 0), key=perplexity)
    at_best = [result for result in own if _rate(result) == _rate(best)]
    return {"lr": _rate(best), "valid": best["valid"], "test": over_seeds(at_best, "test")}


def _tried(own: list[Result]) -> str:
    by_rate = {_rate(result): perplexity(result) for result in own if result["setting"]["seed"] == 0}
    return ", ".join(f"{rate:g}: {_number(value)}" for rate, value in sorted(by_rate.items()))


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "diverged"


def _rate(result: dict[str, Any]) -> float:
    return float(f"{result['setting']['lr']:.6g}")


def main() -> None:
    write_tables(PAGE, tables())


if __name__ == "__main__":
    main()
