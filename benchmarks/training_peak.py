"""Peak memory of training by every method of the quality benchmarks: parameters, gradients, states, activations, all.

    python -m benchmarks.training_peak                 # results/training_peak.json; a quarter of an hour on one core

Each method trains a few steps of its task in a process of its own. The peak is what Linux counts (``VmHWM``), less what
the process holds before the model is made; the same has been done there once before, so that libraries and their
scratch space are in place. glibc's malloc is told to keep no freed memory. Bytes per parameter are of the whole model.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks import sparse_lm, sparse_methods, tied_methods, tied_transformer, usual_recipe
from benchmarks.causal_lm import CausalLM, draw_sequences, loss_of
from benchmarks.command import chosen
from benchmarks.memory_cap import MALLOC, begin_phase, status
from benchmarks.precision import bfloat16_products
from benchmarks.summary import RESULTS
from benchmarks.sweep import Setting

STEPS = 3
REFERENCE = "sgd"  # without momentum: what a training cannot do without
PATH = RESULTS / "training_peak.json"
Training = tuple[Callable[[], None], Optimizer]  # a step, and whose states it uses


def _sparse_lm(name: str) -> Training:
    corpus = sparse_lm._corpus()
    batches = iter(range(STEPS))
    drawn = _drawn()
    model = sparse_lm.Model(corpus.vocabulary)
    tables: Optimizer
    if name == REFERENCE:
        tables = SGD([model.words.weight, model.softmax.weight], lr=1e-3)
    else:
        method = sparse_methods.METHODS[name]
        tables = sparse_methods.build(method, model, [model.words, model.softmax], lr=1e-3, eps=1e-8)
    hidden = Adam(model.hidden.parameters(), lr=1e-3)

    def step() -> None:
        sparse_lm._loss(model, drawn, next(batches)).backward()  # type: ignore[no-untyped-call]
        for optimizer in (tables, hidden):
            optimizer.step()
            optimizer.zero_grad()

    return step, tables


@functools.lru_cache(maxsize=1)
def _drawn() -> sparse_lm.Batches:
    return sparse_lm.draw(sparse_lm._corpus(), 0, STEPS)


def _tied_transformer(name: str) -> Training:
    corpus = tied_transformer._corpus()
    model = tied_transformer.make_model(corpus.vocabulary)
    optimizer = (
        SGD(model.parameters(), lr=1e-3)
        if name == REFERENCE
        else tied_methods.build(tied_methods.METHODS[name], model, model.words, lr=1e-3, eps=1e-8)
    )
    return _causal(model, optimizer, tied_transformer.BATCH, tied_transformer.CONTEXT, corpus)


def _usual_recipe(name: str, kind: str) -> Training:
    model, optimizer = usual_recipe.make(Setting(f"{kind}_adamw" if name == REFERENCE else name, 1e-3, 1e-8, seed=0))
    if name == REFERENCE:
        optimizer = SGD(model.parameters(), lr=1e-3)
    return _causal(model, optimizer, usual_recipe.BATCH, usual_recipe.CONTEXT, usual_recipe._corpus())


def _causal(model: CausalLM, optimizer: Optimizer, batch: int, context: int, corpus: Any) -> Training:
    batches = iter(torch.split(draw_sequences(corpus.train, STEPS * batch, np.random.default_rng(0), context), batch))

    def step() -> None:
        loss_of(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


TASKS: dict[str, tuple[Callable[[str], Training], list[str]]] = {
    "sparse_lm": (_sparse_lm, list(sparse_methods.METHODS)),
    "tied_transformer": (_tied_transformer, [name for name, x in tied_methods.METHODS.items() if x.is_installed]),
    **{
        f"usual_{kind}": (
            functools.partial(_usual_recipe, kind=kind),
            [name for name in usual_recipe.METHODS if name.startswith(f"{kind}_")],
        )
        for kind in ("tied", "untied")
    },
}


def measure(task: str, name: str) -> int:
    """Bytes of a few steps' peak in this process."""
    torch.set_num_threads(1)
    make = TASKS[task][0]
    peaks = []
    with bfloat16_products():
        for _ in range(2):  # once for libraries and their scratch space
            gc.collect()
            before = begin_phase()
            step, optimizer = make(name)
            for _ in range(STEPS):
                step()
                _touch(optimizer)
            peaks.append(status("VmHWM") - before)
            del step, optimizer
    return peaks[-1]


def _touch(optimizer: Optimizer) -> None:
    """Write to all states: pages of zeros that no row of these few steps lies in would not be counted."""
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in sparse_methods.tensors_of(value):
                tensor.copy_(tensor.clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, comma-separated; default: all")
    parser.add_argument("--methods", help="names, comma-separated; default: all of the tasks")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(*arguments.one))
        return
    stored: dict[str, dict[str, int]] = json.loads(PATH.read_text()) if PATH.exists() else {}
    for task in arguments.tasks.split(","):
        known = [REFERENCE, *TASKS[task][1]]
        for name in known if arguments.methods is None else chosen(arguments.methods, known):
            command = [sys.executable, "-m", "benchmarks.training_peak", "--one", task, name]
            found = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | MALLOC
            ).stdout
            stored.setdefault(task, {})[name] = int(found.splitlines()[-1])
            print(task, name, f"{stored[task][name] / 2**20:.1f} MiB", flush=True)
            PATH.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
