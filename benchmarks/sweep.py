"""Tuning by coordinates, with every finished run kept in a JSON-lines file.

The same search serves every method, so that no method is compared at another one's settings:
learning rate at the default eps, eps at that learning rate, learning rate again at that eps.
Learning rates move by factors of two until both neighbours are worse; an eps at the upper edge
of its grid extends it by factors of ten.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec

P = ParamSpec("P")
Result = dict[str, Any]
Score = Callable[[float, float], float]  # (lr, eps) -> validation perplexity

MOST_DOUBLINGS = 6  # of the learning rate, either way; a method that wants more is broken
LARGEST_EPS = 1.0


@dataclass(frozen=True)
class Setting:
    """One run: what is trained and how."""

    method: str
    lr: float
    eps: float
    seed: int


class Cache:
    """Finished runs, one JSON object a line; a second process may append at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def results(self) -> list[Result]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def find(self, setting: Setting) -> Result | None:
        """The finished run of this setting."""
        wanted = _key(setting)
        return next((result for result in self.results() if _key(Setting(**result["setting"])) == wanted), None)

    def run(self, setting: Setting, train: Callable[[Setting], Result]) -> Result:
        """The run's result, trained now if it has not been before."""
        found = self.find(setting)
        return self.add(setting, train(setting)) if found is None else found

    def add(self, setting: Setting, result: Result) -> Result:
        """Keep a finished run."""
        found = {"setting": asdict(setting)} | result
        line = json.dumps(found) + "\n"
        with self.path.open("a") as file:  # one write of one line: appends do not interleave
            file.write(line)
        print(line, end="", flush=True)
        return found


@dataclass(frozen=True)
class Sweep:
    """A benchmark's runs, for workers that get it pickled.

    Args:
        train: one run, whose result has a figure of validation and one of test, None where it diverged.
        cache: of finished runs.
        searches: by method, the first learning rate, and values of eps, of which the search begins with the first.
        default_eps_too: methods that are repeated at the default eps, too, at the best learning rate tried there.
    """

    train: Callable[[Setting], Result]
    cache: Cache
    searches: Mapping[str, tuple[float, Sequence[float]]]
    default_eps_too: Collection[str] = ()

    def tune_and_repeat(self, name: str, seeds: int) -> None:
        """A search on validation data with seed 0, then ``seeds`` runs of what it selected."""
        start, epsilons = self.searches[name]
        tried: dict[float, float] = {}  # learning rate -> perplexity, at the default eps

        def score(lr: float, eps: float) -> float:
            found = perplexity(self.cache.run(Setting(name, lr, eps, seed=0), self.train))
            if eps == epsilons[0]:
                tried[lr] = found
            return found

        lr, eps = tune(score, lr=start, epsilons=epsilons)
        self.repeat(name, lr, eps, seeds)
        if name in self.default_eps_too:
            self.repeat(name, min(tried, key=lambda rate: tried[rate]), epsilons[0], seeds)

    def repeat(self, name: str, lr: float, eps: float, seeds: int) -> None:
        """``seeds`` runs without a search."""
        for seed in range(seeds):
            self.cache.run(Setting(name, lr, eps, seed), self.train)


def tune(score: Score, *, lr: float, epsilons: Sequence[float]) -> tuple[float, float]:
    """The best ``(lr, eps)`` by coordinate search from ``lr`` and ``epsilons[0]``, the default; a single eps stays."""
    lr = climb(lambda rate: score(rate, epsilons[0]), lr)
    if len(epsilons) == 1:
        return lr, epsilons[0]
    eps = min(epsilons, key=lambda value: score(lr, value))
    while eps >= max(epsilons) and eps < LARGEST_EPS and score(lr, 10 * eps) < score(lr, eps):
        eps *= 10
    if eps != epsilons[0]:
        lr = climb(lambda rate: score(rate, eps), lr)
    return lr, eps


def climb(score: Callable[[float], float], start: float) -> float:
    """The learning rate whose half and double are both no better."""
    best = start
    for _ in range(MOST_DOUBLINGS):
        better = min((best, best / 2, best * 2), key=score)
        if better == best:
            break
        best = better
    return best


def perplexity(result: Result) -> float:
    """Validation perplexity; a run that diverged counts as infinitely bad."""
    value = result["valid"]
    return math.inf if value is None else float(value)


def over_seeds(results: Iterable[Result], key: str) -> dict[str, float] | None:
    """``key`` by seed, or None if there is no run or one diverged."""
    values = {str(result["setting"]["seed"]): result[key] for result in results}
    if not values or any(value is None for value in values.values()):
        return None
    return dict(sorted(values.items()))


def false_if_diverged(train: Callable[P, bool]) -> Callable[P, bool]:
    """A training that returns False, too, where a step refuses gradients or states that are not finite."""

    @functools.wraps(train)
    def trained(*args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            return train(*args, **kwargs)
        except (FloatingPointError, RuntimeError) as error:
            if "finite" not in str(error):  # anything but a diverged run is a bug
                raise
            return False

    return trained


def each(work: Callable[[str], None], names: Sequence[str], *, workers: int) -> None:
    """``work(name)`` for all names, on ``workers`` processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the spawned workers
    # glibc gives large blocks back to the system and faults them in again at every step: a quarter of a step's time.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**33)
    if workers == 1:
        for name in names:
            work(name)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(work, names, chunksize=1):
            pass


def _key(setting: Setting) -> tuple[str, str, str, int]:
    # Rounded: 8e-3 * 4 and 32e-3 differ in the last bit.
    return setting.method, f"{setting.lr:.6g}", f"{setting.eps:.6g}", setting.seed
