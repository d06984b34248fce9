"""The tables of docs/papers.md, from ``results/*.json``; what was not run yet is left as it is.

python -m benchmarks.papers_tables
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import mean
from typing import Any

from benchmarks import long_run, lstm_methods, resnet
from benchmarks.make_tables import Rows, against, perplexity, share
from benchmarks.pages import DOCS, write_tables
from benchmarks.summary import RESULTS

PAGE = DOCS / "papers.md"
TARGET = 0.3  # points of accuracy that a compressed ResNet may lose

#: Perplexities of the count-sketch paper (Spring et al., 2019), by setting and family here, by row there.
TABLES: dict[tuple[str, str], tuple[int, dict[str, float]]] = {
    ("full", "momentum"): (3, {"Momentum": 94.25, "CS": 95.93}),
    ("full", "adam"): (4, {"Adam": 105.14, "CS-MV": 109.24, "CS-V": 106.32, "LR-NMF-V": 106.21}),
    ("sampled", "adagrad"): (6, {"Adagrad": 57.63, "CS": 56.07, "LR-NMF": 58.27}),
    ("sampled", "rmsprop"): (7, {"RMSprop": 38.83, "CMS": 39.36, "LR-NMF": 37.56}),
    ("sampled", "adam"): (9, {"Adam": 39.90, "CS-MV": 40.55, "CS-V": 39.88, "LR-NMF-V": 40.41}),
}
#: Its table 5: top-1 accuracies on ImageNet.
ACCURACIES = {"RMSprop": 65.27, "CMS-RMSprop": 69.12}
#: Of `tied_transformer`, what the SM3 paper compares.
SM3_METHODS = (
    "adamw",
    "adagrad_recipe",
    "adagrad_linear",
    "sm3_recipe",
    "sm3_linear",
    "sm3_1_recipe",
    "sm3_1_linear",
    "adafactor_recipe",
    "adafactor_linear",
)


def lstm_table(rows: Rows, softmax: str, family: str) -> str | None:
    """One of the paper's tables and ours beside it; None without a run of exact states."""
    methods = {
        name: method
        for name, method in lstm_methods.METHODS.items()
        if (method.softmax, method.family) == (softmax, family) and name in rows
    }
    exact = f"{softmax}_{family}"
    if exact not in methods:
        return None
    number, figures = TABLES[softmax, family]
    base = figures[methods[exact].paper]
    lines = [
        f"| optimizer | table {number} of the paper | against exact there | here, test perplexity (range over 3 seeds) "
        "| against exact here | state | lr | eps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, method in methods.items():
        row, theirs = rows[name], figures.get(method.paper)
        chosen = row["best"]
        columns = [method.label, "" if theirs is None else f"{theirs:.2f}"]
        columns += ["" if theirs in (None, base) else f"{100 * (theirs / base - 1):+.1f} %"]
        columns += [perplexity(chosen), against(chosen, rows[exact]["best"]), share(row, rows[exact])]
        columns += [f"{chosen['lr']:g}", f"{chosen['eps']:.0e}" if chosen["eps"] else ""]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def resnet_table(rows: Rows) -> str | None:
    """Accuracies; each method beside the exact optimizer that it compresses."""
    lines = [
        "| optimizer | table 5 of the paper | here, test accuracy (range over 3 seeds) | against exact, points "
        f"| within {TARGET} of exact | state | lr |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in resnet.METHODS.items():
        if name not in rows or method.family not in rows:
            continue
        chosen, exact = rows[name]["best"], rows[method.family]
        theirs = ACCURACIES.get(method.paper)
        gains = points(chosen, exact["best"])
        columns = [method.label, "" if theirs is None else f"{theirs:.2f}", accuracy(chosen)]
        if name == method.family or not gains:
            columns += ["", ""]
        else:
            columns += [f"{mean(gains):+.2f} ({min(gains):+.2f} to {max(gains):+.2f})"]
            columns += ["yes" if mean(gains) >= -TARGET else "**no**"]
        columns += [share(rows[name], exact), f"{chosen['lr']:g}"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) if len(lines) > 2 else None


def accuracy(chosen: Mapping[str, Any]) -> str:
    """Mean and range over seeds, of what was stored as errors in percent."""
    found = [100 - error for error in (chosen["test"] or {}).values()]
    if not found:
        return "-"
    if len(found) == 1:
        return f"{found[0]:.2f} (1 seed)"
    return f"{mean(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def points(chosen: Mapping[str, Any], exact: Mapping[str, Any]) -> list[float]:
    """By how much the accuracy is above the exact optimizer's, seed by seed."""
    if not (chosen["test"] and exact["test"]):
        return []
    return [exact["test"][seed] - chosen["test"][seed] for seed in sorted(chosen["test"].keys() & exact["test"].keys())]


def sm3_table(rows: Rows) -> str | None:
    """The optimizers of the SM3 paper on the tied Transformer, each by both schedules."""
    names = [name for name in SM3_METHODS if name in rows]
    if len(names) < 3:  # what docs/quality.md has already
        return None
    lines = [
        "| optimizer of all parameters | test perplexity (range over 3 seeds) | against AdamW | state | lr "
        "| valid by lr, seed 0 |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        chosen, exact = rows[name]["best"], rows["adamw"]
        tried = ", ".join(
            f"{x['lr']:g}: {'-' if x['valid'] is None else format(x['valid'], '.1f')}" for x in rows[name]["tried"]
        )
        columns = [rows[name]["label"], perplexity(chosen), against(chosen, exact["best"])]
        columns += [share(rows[name], exact), f"{chosen['lr']:g}", tried]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Every table that there are results for, by its marks.

    Args:
        results: what is in ``results/NAME.json``, by name; any may be absent.
    """

    def rows(name: str) -> Rows:
        return results.get(name, {}).get("methods", {})  # type: ignore[no-any-return]

    found: dict[str, str | None] = {
        f"lstm_{softmax}_{family}": lstm_table(rows("lstm_lm"), softmax, family) for softmax, family in TABLES
    }
    found |= {"resnet": resnet_table(rows("resnet")), "sm3": sm3_table(rows("tied_transformer"))}
    if (stored := results.get("long_run")) is not None:
        found |= {
            "long_run_second": long_run.table(stored, "second", "step_factor"),
            "long_run_spread": long_run.table(stored, "second", "step_spread"),
            "long_run_sum": long_run.table(stored, "sum", "step_factor"),
            "long_run_first": long_run.table(stored, "first", "rms_error"),
        }
    return {name: table for name, table in found.items() if table is not None}


def main() -> None:
    names = ("lstm_lm", "resnet", "tied_transformer", "long_run")
    stored = {
        name: json.loads((RESULTS / f"{name}.json").read_text())
        for name in names
        if (RESULTS / f"{name}.json").exists()
    }
    write_tables(PAGE, tables(stored))


if __name__ == "__main__":
    main()
