"""Quality over the memory of the whole training: a table and a picture for each task.

    python -m benchmarks.frontier     # results/*.json -> docs/quality.md, docs/img/frontier_*.png

Quality is of the quality benchmarks' results, each method at its own tuned settings; memory is the training's peak
measured by :mod:`benchmarks.training_peak`, in bytes per parameter of the whole model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import usual_recipe_tables
from benchmarks.make_tables import PAGE, against, perplexity
from benchmarks.pages import DOCS, write_tables
from benchmarks.summary import RESULTS
from benchmarks.training_peak import PATH, REFERENCE


@dataclass(frozen=True)
class Task:
    """A quality benchmark; `exact` names the exact optimizer, `parameters` counts those of the whole model."""

    title: str
    exact: str
    parameters: int


#: All vocabularies have one word more, for all others.
TASKS = {
    "sparse_lm": Task("Language model, two sparse tables of 109,213 words", "adam", 2 * 109_213 * 64 + 82_240),
    "tied_transformer": Task("Transformer, tied table of 20,001 words", "adamw", 2_962_816),
    "usual_tied": Task("Transformer by the usual recipe, tied table of 16,385 words", "tied_adamw", 2_508_160),
    "usual_untied": Task("Transformer by the usual recipe, two tables of 16,385 words", "untied_adamw", 4_605_440),
}


@dataclass(frozen=True)
class Point:
    """A method; `best` is what the benchmark found at its best setting."""

    name: str
    label: str
    state: float  # bytes of states per parameter of the whole model
    peak: float  # bytes of the training's peak per parameter
    best: dict[str, Any]

    @property
    def quality(self) -> float:
        return mean(self.best["test"].values()) if self.best["test"] else float(self.best["valid"])


def tables() -> dict[str, str]:
    """One for each task, by the name of their marks."""
    return {f"frontier_{name}": table(*measured(name), task) for name, task in TASKS.items()}


def points(rows: dict[str, dict[str, Any]], peaks: dict[str, int], parameters: int) -> list[Point]:
    """All methods whose quality and peak were measured, the smallest peak first."""
    found = [
        Point(name, row["label"], row["state_bytes"] / parameters, peaks[name] / parameters, row["best"])
        for name, row in rows.items()
        if name in peaks
    ]
    return sorted(found, key=lambda point: (round(point.peak, 1), point.quality))


def is_on_the_frontier(point: Point, others: list[Point]) -> bool:
    """No other is better with as few bytes; what the scale of the peak cannot tell apart is as few."""
    return not any(other.quality < point.quality and other.peak < 1.01 * point.peak for other in others)


def table(found: list[Point], least: float, task: Task) -> str:
    """The smallest peak first; what nothing dominates is bold."""
    exact = next(point for point in found if point.name == task.exact)
    lines = [
        f"| optimizer (plain SGD trains in {least:.1f} B a parameter) | states, B a parameter | peak, B a parameter "
        "| test perplexity | against exact |",
        "|---|---|---|---|---|",
    ]
    for point in found:
        label = f"**{point.label}**" if is_on_the_frontier(point, found) else point.label
        columns = [label, f"{point.state:.3g}", f"{point.peak:.1f}", perplexity(point.best)]
        lines.append(f"| {' | '.join([*columns, against(point.best, exact.best)])} |")
    return "\n".join(lines)


def plot(found: list[Point], least: float, task: Task, path: Path) -> None:
    """Quality over the peak; stars are exact optimizers, the line is what nothing dominates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=110)
    axes.axvline(least, color="gray", lw=0.8, ls="--", label="plain SGD")
    best = [point for point in found if is_on_the_frontier(point, found)]
    axes.plot([point.peak for point in best], [point.quality for point in best], color="tab:green", lw=1, alpha=0.6)
    for point in found:
        exact = "exact" in point.label
        axes.plot(point.peak, point.quality, "*" if exact else "o", color="black" if exact else "tab:blue")
        axes.annotate(point.name, (point.peak, point.quality), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("peak of the training, bytes per parameter")
    axes.set_ylabel("test perplexity at the method's own best setting")
    axes.set_title(task.title)
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def measured(name: str) -> tuple[list[Point], float]:
    """A task's points, and the peak of plain SGD in bytes per parameter."""
    peaks = json.loads(PATH.read_text())[name]
    parameters = TASKS[name].parameters
    return points(_rows(name), peaks, parameters), peaks[REFERENCE] / parameters


def _rows(name: str) -> dict[str, dict[str, Any]]:
    if name.startswith("usual_"):
        runs = json.loads((RESULTS / "usual_recipe.json").read_text())["runs"]
        return usual_recipe_tables.rows(runs, name.removeprefix("usual_"))
    found: dict[str, dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["methods"]
    return found


def main() -> None:
    write_tables(PAGE, tables())
    for name, task in TASKS.items():
        plot(*measured(name), task, DOCS / "img" / f"frontier_{name}.png")


if __name__ == "__main__":
    main()
