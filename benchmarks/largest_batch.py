"""The largest batch that each optimizer trains at below one memory cap, and how long a training takes at it.

A study is a script whose process trains one step of few examples, which makes the states, and steps of a batch. The
cap is enforced by the operating system (`memory_cap`); sizes are found by bisection over such processes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.memory_cap import MIB, answer, enforced_by, largest, needs_of, run_capped
from benchmarks.summary import RESULTS

FEW = 2  # examples of the first step
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
        parser.add_argument("--threads", type=int, default=1, help="of a training that is timed")
        parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
        parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
        arguments = parser.parse_args()
        if arguments.one and arguments.time:
            torch.set_num_threads(arguments.threads)
            answer(lambda: self._seconds(arguments.one, arguments.batch))
        elif arguments.one:
            torch.set_num_threads(1)
            answer(lambda: {"needs": needs_of(lambda: self._train(arguments.one, arguments.batch))})
        elif arguments.time:
            self._time(arguments.methods.split(","), arguments.threads)
        else:
            self._find(arguments.methods.split(","))

    def stored(self) -> dict[str, Any]:
        """What was found; methods that were not measured are absent."""
        path = RESULTS / f"{self.name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("cap") == self.cap else {"cap": self.cap, "batch": self.batch, "methods": {}}

    def _find(self, names: list[str]) -> None:
        """The largest batch of every method, and what it needs at one batch without a cap."""
        stored = self.stored() | {"enforced_by": enforced_by(), "torch": torch.__version__}
        for name in names:
            needs = {batch: self._child(name, batch, None)["needs"] for batch in (self.batch // 4, self.batch)}
            each = (needs[self.batch] - needs[self.batch // 4]) / (self.batch - self.batch // 4)
            room = self.cap - needs[self.batch]  # beyond what the batch needs; bisection starts at the guess
            start = max(1, self.batch + int(room / each)) if each > 0 else self.batch
            tried: dict[int, bool] = {}

            def fits(batch: int, name: str = name, tried: dict[int, bool] = tried) -> bool:
                tried[batch] = self._child(name, batch, self.cap) is not None
                return tried[batch]

            found = largest(fits, start=start)
            stored["methods"][name] = {
                "label": self.methods[name], "largest": found, "needs": needs[self.batch], "tried": tried
            }  # fmt: skip
            print(name, stored["methods"][name], flush=True)
            self._write(stored)

    def _time(self, names: list[str], threads: int) -> None:
        """Seconds of an example, below the cap at the largest batch: processes of all methods in turn."""
        stored = self.stored()
        names = [name for name in names if stored["methods"].get(name, {}).get("largest")]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                found = self._child(name, stored["methods"][name]["largest"], self.cap, "--time", threads=threads)
                seconds[name].append(found["seconds"])
                print(name, found, flush=True)
        for name in names:
            stored["methods"][name]["seconds"] = median(seconds[name])
        self._write(stored | {"threads": threads})

    def _child(self, name: str, batch: int, cap: int | None, *options: str, threads: int = 1) -> Any:
        arguments = ["--one", name, "--batch", str(batch), "--threads", str(threads), *options]
        return run_capped(f"benchmarks.{self.name}", arguments, cap=cap, threads=threads)

    def _train(self, name: str, batch: int) -> None:
        step = self.make(name)
        for examples in (FEW, batch):
            step(examples)

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
