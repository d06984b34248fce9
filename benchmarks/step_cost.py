"""What one optimizer step of the tables costs: milliseconds and the most temporary bytes.

    python -m benchmarks.step_cost

The gradients are those of :mod:`benchmarks.sparse_lm`, recorded before; each method steps in turn, round
after round, so that a disturbance of the machine hits all of them. Processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks import sparse_lm
from benchmarks.sparse_methods import METHODS, build, state_bytes
from benchmarks.summary import RESULTS

RECORDED = 12  # batches, used in turn
ROUNDS = 60
WARM_UP = 5
REFERENCE = "adam"
EPS = 1e-8

Pair = tuple[Tensor, Tensor]  # gradients of both tables, as autograd made them (uncoalesced)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, comma-separated; default: all")
    names = parser.parse_args().methods.split(",")
    torch.set_num_threads(1)
    model, gradients = _gradients()
    optimizers = {}
    for name in dict.fromkeys([REFERENCE, *names]):
        layers = [_copy(layer) for layer in model]
        own = torch.nn.ModuleList(layers)
        optimizers[name] = build(METHODS[name], own, layers, lr=1e-4, eps=EPS)

    labels = {name: method.label for name, method in METHODS.items()}
    compare("step_cost", optimizers, gradients, labels, reference=REFERENCE, warm_up=WARM_UP, rounds=ROUNDS)


def compare(
    result: str,
    optimizers: Mapping[str, Optimizer],
    gradients: Sequence[tuple[Tensor, ...]],
    labels: Mapping[str, str],
    *,
    reference: str,
    warm_up: int,
    rounds: int,
) -> None:
    """Step all optimizers in turn, round after round, and write ``results/RESULT.json``.

    Args:
        gradients: used in turn, one for each round.
        reference: the optimizer that ratios are against.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for i in range(warm_up + rounds):
        for name, optimizer in optimizers.items():
            taken = step_time(optimizer, gradients[i % len(gradients)])
            if i >= warm_up:
                milliseconds[name].append(taken)
    against = statistics.median(milliseconds[reference])
    rows: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        median = statistics.median(milliseconds[name])
        rows[name] = {
            "label": labels[name],
            "milliseconds": median,
            "ratio": median / against,
            "transient_bytes": transient(optimizer, gradients[0]),
            "state_bytes": state_bytes(optimizer),
        }
        print(f"{name:15} {median:7.2f} ms  {median / against:5.2f}x  {rows[name]['transient_bytes']:>12,} B")
    stored = {"torch": torch.__version__, "cpu_threads": 1, "methods": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result}.json").write_text(json.dumps(stored, indent=1) + "\n")


def _copy(layer: torch.nn.Embedding) -> torch.nn.Embedding:
    weight = layer.weight.detach().clone()
    return torch.nn.Embedding(layer.num_embeddings, layer.embedding_dim, sparse=True, _weight=weight)


def _gradients() -> tuple[list[torch.nn.Embedding], list[Pair]]:
    model = sparse_lm.Model(sparse_lm._corpus().vocabulary)
    batches = sparse_lm._batches(0)
    gradients = []
    for step in range(RECORDED):
        loss = sparse_lm._loss(model, batches, step)
        words, softmax = torch.autograd.grad(loss, [model.words.weight, model.softmax.weight])
        gradients.append((words, softmax))
    return [model.words, model.softmax], gradients


def step_time(optimizer: Optimizer, gradients: tuple[Tensor, ...]) -> float:
    """Milliseconds of one step, of processor time."""
    _give(optimizer, gradients)
    began = time.process_time()  # one thread: the same as wall time, but for other processes
    optimizer.step()
    taken = time.process_time() - began
    optimizer.zero_grad()
    return 1e3 * taken


def _give(optimizer: Optimizer, gradients: tuple[Tensor, ...]) -> None:
    """Clones: an optimizer may coalesce its gradients in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()


def transient(optimizer: Optimizer, gradients: tuple[Tensor, ...]) -> int:
    """The most bytes allocated beyond what was there before the step."""
    _give(optimizer, gradients)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    optimizer.zero_grad()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


if __name__ == "__main__":
    main()
