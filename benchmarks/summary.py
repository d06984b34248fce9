"""Finished runs -> ``results/NAME.json``: what was selected for each method and how it did."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.sweep import Result, over_seeds, perplexity

RESULTS = Path(__file__).parent / "results"
LEAST_SETTINGS = 3  # tried; a method whose search has hardly begun would look bad for no fault of its own
Group = list[Result]


def write(name: str, results: list[Result], methods: Mapping[str, tuple[str, float]]) -> Path:
    """Summarise ``results``; ``methods`` gives each method's label and default eps, in table order.

    A method without runs here keeps the row it has, and so does one whose row has more seeds than the runs here: a new
    machine adds to the figures and does not wipe them out.
    Methods without a search are listed apart, at the best setting of the first.
    """
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"methods": {}}
    groups = {method: [result for result in results if result["setting"]["method"] == method] for method in methods}
    rows: dict[str, Any] = {}
    for method, (label, default_eps) in methods.items():
        kept = before["methods"].get(method)
        if _is_tuned(groups[method]):
            made = {"label": _label(label, groups[method])} | _summary(groups[method], default_eps)
            rows[method] = kept if kept and _has_more_seeds(kept, made) else made
        elif kept:
            rows[method] = kept
    untuned: dict[str, Any] = {}
    reference = best_of_first(rows) if rows else None
    for method, (label, _) in methods.items():
        own = [result for result in groups[method] if _point(result) == reference]
        if own and not _is_tuned(groups[method]):
            test = over_seeds(own, "test")
            best = {"state_bytes": own[0]["state_bytes"], "best": {"test": test}}
            untuned[method] = {"label": _label(label, own)} | best
        elif method in before.get("untuned", {}):
            untuned[method] = before["untuned"][method]
    stored = {"environment": environment(), "methods": rows, "untuned": untuned}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{len(rows)} methods, {len(results)} runs -> {path.relative_to(RESULTS.parent.parent)}")
    return path


def _label(label: str, own: Group) -> str:
    """With the version of the other library that was measured, if there is one."""
    version = own[0].get("version", "")
    return f"{label} ({version})" if version else label


def best_of_first(rows: Mapping[str, Any]) -> tuple[float, float]:
    """The best ``(lr, eps)`` of the first method, which is exact."""
    best = next(iter(rows.values()))["best"]
    return best["lr"], best["eps"]


def _is_tuned(own: Group) -> bool:
    return len({_point(result) for result in own}) >= LEAST_SETTINGS


def _summary(own: Group, default_eps: float) -> dict[str, Any]:
    first_seed = [result for result in own if result["setting"]["seed"] == 0]
    tried = {_point(result): perplexity(result) for result in first_seed}
    at_default = {point: value for point, value in tried.items() if point[1] == default_eps}
    return {
        "state_bytes": own[0]["state_bytes"],
        "runs": len(own),
        "train_seconds": sorted(result["seconds"]["train"] for result in own)[len(own) // 2],
        "best": _at(min(tried, key=lambda point: tried[point]), own, tried),
        "default_eps": _at(min(at_default, key=lambda point: at_default[point]), own, tried),
        "tried": [{"lr": lr, "eps": eps, "valid": value} for (lr, eps), value in sorted(tried.items())],
    }


def _at(point: tuple[float, float], own: Group, tried: Mapping[tuple[float, float], float]) -> dict[str, Any]:
    tested = [result for result in own if _point(result) == point and result["test"] is not None]
    return {"lr": point[0], "eps": point[1], "valid": tried[point], "test": over_seeds(tested, "test")}


def _has_more_seeds(kept: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    before, now = kept["best"]["test"], made["best"]["test"]  # None where a run diverged: that counts
    return before is not None and now is not None and len(before) > len(now)


def _point(result: Result) -> tuple[float, float]:
    setting = result["setting"]
    return float(f"{setting['lr']:.6g}"), float(f"{setting['eps']:.6g}")


def environment() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version(), "threads": "1 per run"}
