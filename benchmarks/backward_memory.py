"""Peak memory of a training whose tables have dense gradients: steps in backward beside ordinary ones and plain SGD.

    python -m benchmarks.backward_memory

The model is the demo's, with ``sparse=False``: two tables of 101 thousand rows and 128 columns, 52 MB each, which hold
nearly all of its parameters. Batches are synthetic tokens of Zipf's distribution. Every method trains a few steps in
three processes of its own, of which the one in the middle counts. How much memory a process had at its peak the system
says (VmHWM, so Linux only). "Of training" is what that is above the process with the model made, plus the parameters.
One thread. Writes ``results/backward_memory.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.memory_cap import status
from benchmarks.summary import RESULTS
from lightning_sketch import Policy, compress, report
from lightning_sketch.text import human_bytes, table

VOCABULARY = 101_000
STEPS, RUNS = 4, 3
DEMO = Path(__file__).parents[1] / "examples" / "demo"


@dataclass(frozen=True)
class Method:
    """What trains the model.

    Args:
        label: how the table calls it.
        make: makes the optimizer.
    """

    label: str
    make: Callable[[nn.Module], Optimizer]


def _compressed(preset: str, *, in_backward: bool) -> Callable[[nn.Module], Optimizer]:
    def make(model: nn.Module) -> Optimizer:
        optimizer = AdamW(model.parameters(), lr=1e-3)
        made: Optimizer = compress(optimizer, model, Policy.preset(preset), step_in_backward=in_backward)
        return made

    return make


METHODS = {
    "sgd": Method("SGD, without momentum", lambda model: SGD(model.parameters(), lr=1e-3)),
    "adamw": Method("AdamW", lambda model: AdamW(model.parameters(), lr=1e-3)),
    "adamw_fused": Method("AdamW(fused=True)", lambda model: AdamW(model.parameters(), lr=1e-3, fused=True)),
    **{
        f"{preset}{'_in_backward' if in_backward else ''}": Method(
            f"AdamW, preset {preset!r}{', step_in_backward=True' if in_backward else ''}",
            _compressed(preset, in_backward=in_backward),
        )
        for preset in ("tables", "whole-model", "8bit")
        for in_backward in (False, True)
    },
}
REFERENCE = "sgd"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, comma-separated; default: all")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="rows of both tables")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(METHODS[options.one], options.vocabulary)))
        return
    names = list(dict.fromkeys([REFERENCE, *options.methods.split(",")]))
    found = {name: _median(name, options.vocabulary) for name in names}
    for name in names:
        found[name]["against_sgd"] = found[name]["peak"] / found[REFERENCE]["peak"]
    print(_table(found))
    if options.vocabulary == VOCABULARY and names == list(METHODS):
        stored = {"torch": torch.__version__, "vocabulary": VOCABULARY, "steps": STEPS, "runs": RUNS, "methods": found}
        (RESULTS / "backward_memory.json").write_text(json.dumps(stored, indent=1) + "\n")


def measure(method: Method, vocabulary: int) -> dict[str, Any]:
    """Train a few steps in this process.

    Returns:
        bytes: ``parameters``, ``state``, ``process``, the peak of the whole process, and ``peak``, what that is above
        what the process had before but for the parameters.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches = _demo(vocabulary)
    parameters = sum(param.nbytes for param in model.parameters())
    before = status("VmRSS") - parameters
    optimizer = method.make(model)
    for batch in batches:
        loss = model.sampled_loss(model(batch[:, :-1]), model.targets(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state, peak = report(optimizer).state, status("VmHWM")
    return {"label": method.label, "parameters": parameters, "state": state, "process": peak, "peak": peak - before}


def _demo(vocabulary: int) -> tuple[Any, list[Tensor]]:
    """The demo's model with dense gradients, and batches for it."""
    sys.path.insert(0, str(DEMO))
    from model import NextToken
    from settings import Settings

    settings = Settings()
    ranks = np.arange(1, vocabulary + 1)
    counts = (1e7 / ranks).astype(np.int64)
    model = NextToken(settings, counts)
    model.input.sparse = model.output.sparse = False
    random = np.random.default_rng(0)
    shape = settings.windows, settings.context + settings.length
    batches = [torch.from_numpy(random.choice(vocabulary, shape, p=counts / counts.sum())) for _ in range(STEPS)]
    return model, batches


def _median(name: str, vocabulary: int) -> dict[str, Any]:
    runs = [_in_a_fresh_process(name, vocabulary) for _ in range(RUNS)]
    return sorted(runs, key=lambda run: run["peak"])[RUNS // 2]


def _in_a_fresh_process(name: str, vocabulary: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.backward_memory", "--one", name, "--vocabulary", str(vocabulary)]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return measured


def _table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            one["label"],
            *(human_bytes(one[key]) for key in ("state", "process", "peak")),
            f"{one['against_sgd']:.2f}",
        )
        for one in found.values()
    ]
    title = f"parameters: {human_bytes(found[REFERENCE]['parameters'])}"
    return table(title, ("method", ">optimizer state", ">peak of the process", ">of training", ">against SGD"), rows)


if __name__ == "__main__":
    main()
