"""The command line of the quality benchmarks: which methods, how many seeds, how many processes."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.summary import RESULTS, best_of_first, write
from benchmarks.sweep import Cache, each


def run_command(
    result: str,
    doc: str | None,
    methods: Mapping[str, tuple[str, float]],
    cache: Cache,
    *,
    prepare: Callable[[], object],
    tune_and_repeat: Callable[..., None],
    repeat: Callable[..., None],
) -> None:
    """Tune and repeat the methods asked for, then write ``results/RESULT.json``.

    Args:
        doc: the script's docstring; its first line is the description.
        methods: each method's label and default eps, in table order.
        cache: of finished runs.
        prepare: called once before the workers start.
        tune_and_repeat: called with a method's name and ``seeds``.
        repeat: called with a method's name, ``lr``, ``eps`` and ``seeds``, with ``--untuned``.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--methods", default=",".join(methods), help="names, comma-separated; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the selected setting; 0: only tune")
    parser.add_argument("--untuned", action="store_true", help="no search: the first method's best lr and eps for all")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--summarise", action="store_true", help=f"only write results/{result}.json")
    arguments: Any = parser.parse_args()
    names = arguments.methods.split(",")
    unknown = sorted(set(names) - set(methods))
    if unknown:
        raise SystemExit(f"Unknown methods {unknown}; known: {sorted(methods)}")
    if not arguments.summarise:
        prepare()  # the text is downloaded and tokenised once
        work = functools.partial(tune_and_repeat, seeds=arguments.seeds)
        if arguments.untuned:
            lr, eps = best_of_first(json.loads((RESULTS / f"{result}.json").read_text())["methods"])
            work = functools.partial(repeat, lr=lr, eps=eps, seeds=arguments.seeds)
        each(work, names, workers=arguments.workers)
    write(result, cache.results(), methods)
