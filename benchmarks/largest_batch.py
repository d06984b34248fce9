"""The largest batch that each optimizer trains at below one memory cap, and how long a training takes at it.

A study is a script whose process trains one step of few examples, which makes the states, and steps of a batch. The
cap is enforced by the operating system (`memory_cap`); sizes are found by bisection over such processes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from benchmarks.memory_cap import MIB, answer, enforced_by, largest, needs_of, run_capped
from benchmarks.summary import RESULTS

FEW = 2  # examples of the first step
PRECISION = 0.04  # of the largest batch
ROUNDS = 3  # of timing
Step = Callable[[int], None]  # a training step of so many examples


@dataclass(frozen=True)
class Study:
    """A model, its optimizers and a cap.

    Args:
        name: of the script in `benchmarks` and of its JSON.
        methods: labels by name; the first is the exact optimizer that the others are compared with.
        make: makes a method's model and optimizer in a fresh process, and gives its training step.
        cap: bytes that a process may have of its own.
        batch: what the cap was chosen for: about the largest batch of the first method.
        examples: as many are trained on, at the least, where a training is timed.
    """

    name: str
    methods: Mapping[str, str]
    make: Callable[[str], Step]
    cap: int
    batch: int
    examples: int

    def main(self, doc: str | None) -> None:
        """The command line."""
        parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
        parser.add_argument("--methods", default=",".join(self.methods), help="names, comma-separated; default: all")
        parser.add_argument("--time", action="store_true", help="time trainings at the batches that were found before")
        parser.add_argument("--threads", type=int, default=2, help="of every training")
        parser.add_argument("--cap", type=int, help="another cap, MiB; what is found below it is printed, not stored")
        parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
        parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
        arguments = parser.parse_args()
        if arguments.one:  # with the threads that its environment gives it
            answer(lambda: (self._seconds if arguments.time else self._needs)(arguments.one, arguments.batch))
            return
        names = arguments.methods.split(",")
        if arguments.cap is not None and arguments.time:
            parser.error("--time is of the batches that were stored, which are those of the study's own cap")
        if arguments.cap is not None:
            for name in names:
                print(replace(self, cap=arguments.cap * MIB)._largest(name, arguments.threads))
            return
        measure = self._time if arguments.time else self._find
        measure(names, arguments.threads)

    def stored(self) -> dict[str, Any]:
        """What was found; methods that were not measured are absent."""
        path = RESULTS / f"{self.name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("cap") == self.cap else {"cap": self.cap, "batch": self.batch, "methods": {}}

    def _find(self, names: list[str], threads: int) -> None:
        stored = self.stored() | {"enforced_by": enforced_by(), "threads": threads, "torch": torch.__version__}
        for name in names:
            stored["methods"][name] = self._largest(name, threads)
            self._write(stored)

    def _largest(self, name: str, threads: int) -> dict[str, Any]:
        """The largest batch of a method, and what it needs at one batch without a cap."""
        few, many = self.batch, 4 * self.batch
        needs = {batch: self._child(name, batch, None, threads)["needs"] for batch in (few, many)}
        each = max(1.0, (needs[many] - needs[few]) / (many - few))
        start = max(1, many + int((self.cap - needs[many]) / each))  # a guess, where bisection starts
        tried: dict[int, bool] = {}

        def fits(batch: int) -> bool:
            tried[batch] = self._child(name, batch, self.cap, threads) is not None
            print(f"{name}: {batch:,} {'fits' if tried[batch] else 'does not fit'}", flush=True)
            return tried[batch]

        found = largest(fits, start=start, precision=PRECISION)
        return {"label": self.methods[name], "largest": found, "needs": needs[few], "tried": tried}

    def _time(self, names: list[str], threads: int) -> None:
        """Seconds of an example at the largest batch, which was found below the cap: processes of all in turn."""
        stored = self.stored()
        names = [name for name in names if stored["methods"].get(name, {}).get("largest")]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                found = self._child(name, stored["methods"][name]["largest"], None, threads, "--time")
                seconds[name].append(found["seconds"])
                print(name, found, flush=True)
        for name in names:
            stored["methods"][name]["seconds"] = median(seconds[name])
        self._write(stored)

    def _child(self, name: str, batch: int, cap: int | None, threads: int, *options: str) -> Any:
        arguments = ["--one", name, "--batch", str(batch), *options]
        return run_capped(f"benchmarks.{self.name}", arguments, cap=cap, threads=threads)

    def _needs(self, name: str, batch: int) -> dict[str, Any]:
        """Bytes of two steps: the first makes the states."""

        def train() -> None:
            step = self.make(name)
            step(FEW)
            step(batch)

        return {"needs": needs_of(train)}

    def _seconds(self, name: str, batch: int) -> dict[str, Any]:
        """Of an example: the median step's."""
        step = self.make(name)
        step(FEW)
        step(batch)
        times = []
        for _ in range(max(3, -(-self.examples // batch))):
            began = time.perf_counter()
            step(batch)
            times.append((time.perf_counter() - began) / batch)
        return {"seconds": median(times)}

    def _write(self, stored: dict[str, Any]) -> None:
        methods = stored["methods"]
        stored["methods"] = {name: methods[name] for name in self.methods if name in methods}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(stored, indent=1) + "\n")


def table(stored: dict[str, Any]) -> str:
    """The largest batch of every method, what it needs at one batch, and how long an example takes."""
    rows = stored["methods"]
    exact = next(iter(rows.values()))
    timed = "seconds" in exact
    header = [
        "optimizer", "largest batch", "against exact", f"needs at a batch of {stored['batch']:,}, MiB",
        "at its largest batch, time of an epoch against exact",
    ]  # fmt: skip
    lines = []
    for row in rows.values():
        columns = [row["label"], f"{row['largest']:,}", f"{row['largest'] / exact['largest']:.2f}"]
        columns += [f"{row['needs'] / MIB:,.0f}"]
        if timed:
            columns += [f"{row['seconds'] / exact['seconds']:.2f}" if "seconds" in row else ""]
        lines.append(f"| {' | '.join(columns)} |")
    header = header if timed else header[:-1]
    return "\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines])
