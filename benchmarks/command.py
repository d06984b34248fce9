"""The command line of the quality benchmarks: which methods, how many seeds, how many processes."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from benchmarks.summary import RESULTS, best_of_first, write
from benchmarks.sweep import Sweep, each


def run_command(
    result: str,
    doc: str | None,
    sweep: Sweep,
    labels: Mapping[str, str],
    *,
    prepare: Callable[[], object],
    not_installed: Mapping[str, str] | None = None,
) -> None:
    """Tune and repeat the methods asked for, then write ``results/RESULT.json``.

    Args:
        doc: the script's docstring; its first line is the description.
        sweep: what is trained.
        labels: by method, in table order.
        prepare: called once before the workers start.
        not_installed: by method that is left out, the package that it would take.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--methods", default=",".join(labels), help="names, comma-separated; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the selected setting; 0: only tune")
    parser.add_argument("--untuned", action="store_true", help="no search: the first method's best lr and eps for all")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--summarise", action="store_true", help=f"only write results/{result}.json")
    arguments: Any = parser.parse_args()
    names = chosen(arguments.methods, labels)
    if not arguments.summarise:
        prepare()  # the text is downloaded and tokenised once
        work = functools.partial(sweep.tune_and_repeat, seeds=arguments.seeds)
        if arguments.untuned:
            lr, eps = best_of_first(json.loads((RESULTS / f"{result}.json").read_text())["methods"])
            work = functools.partial(sweep.repeat, lr=lr, eps=eps, seeds=arguments.seeds)
        each(work, _without(names, not_installed or {}), workers=arguments.workers)
    write(result, sweep.cache.results(), {name: (labels[name], sweep.searches[name][1][0]) for name in labels})


def chosen(methods: str, known: Collection[str]) -> list[str]:
    """Names that are written with commas between them, all of them known."""
    names = methods.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"Unknown methods {unknown}; known: {sorted(known)}")
    return names


def _without(names: Sequence[str], not_installed: Mapping[str, str]) -> list[str]:
    for name in names:
        if name in not_installed:
            print(f"{name}: {not_installed[name]} is not installed")
    return [name for name in names if name not in not_installed]
