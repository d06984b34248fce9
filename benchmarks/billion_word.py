"""Peak memory of the 1-Billion-Word language model at the size of the count-sketch paper, by optimizer.

793,471 words, embedding 256, LSTM 2,048 projected to 256, sampled softmax over 8,192 words, 20 words back, batches of
1,024 (Spring et al., ICML 2019, section 6.3 and table 8). Both tables have sparse gradients. Steps are real; the words
are drawn by Zipf's law, because memory depends on how many are distinct and on nothing else. Each optimizer runs in a
process of its own, whose peak is what Linux counts (``VmHWM``, less what it is after imports), set back before every
phase.

    python -m benchmarks.billion_word                        # results/billion_word.json and the table
    python -m benchmarks.billion_word --methods sgd,default --batch 256
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam

from benchmarks.losses import sampled_softmax_loss
from benchmarks.summary import RESULTS

WORDS = 793_471
WIDTH = 256  # of the embedding and of the projection
HIDDEN = 2_048
SAMPLED = 8_192
LENGTH = 20  # words back
BATCH = 1_024
STEPS = 3
MIB = 2**20


class Model(nn.Module):
    """The paper's model: word ids ``[length, batch]`` -> features ``[length, batch, 256]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, sparse=True)
        self.lstm = nn.LSTM(WIDTH, HIDDEN, proj_size=WIDTH)
        self.softmax = nn.Embedding(WORDS, WIDTH, sparse=True)

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.lstm(self.embedding(ids))[0]
        return features


Make = Callable[[Model], list[Optimizer]]


def _tables(model: Model) -> list[Tensor]:
    return [model.embedding.weight, model.softmax.weight]


def _exact(model: Model) -> list[Optimizer]:
    return [SparseAdam(_tables(model), lr=5e-4), Adam(model.lstm.parameters(), lr=5e-4, fused=True)]


def _compressed(policy: Callable[[Any], Any], adagrad: bool = False) -> Make:
    def make(model: Model) -> list[Optimizer]:
        import lightning_sketch as ls

        if adagrad:
            return [ls.compress(Adagrad(model.parameters(), lr=0.1), model, policy(ls))]
        tables, rest = _exact(model)
        return [ls.compress(tables, model, policy(ls)), rest]

    return make


def _paper(first: bool) -> Make:
    def policy(ls: Any) -> Any:
        sketch = ls.CountSketch(compression=5, depth=3, update="paper")
        return ls.Policy(
            [ls.Rule(name="*.weight", second_moment=sketch, **({"first_moment": sketch} if first else {}))]
        )

    return _compressed(policy)


#: By name: the label, and what steps the model.
METHODS: dict[str, tuple[str, Make]] = {
    "sgd": ("SGD, no momentum", lambda model: [SGD(model.parameters(), lr=0.1)]),
    "exact": ("SparseAdam and Adam, exact", _exact),
    "sketch_mv": ("the paper's sketches of both moments, 5x", _paper(first=True)),
    "sketch_v": ("the paper's sketch of the second moment, 5x", _paper(first=False)),
    "sm3": (
        "SM3, no first moment",
        _compressed(lambda ls: ls.Policy([ls.Rule(name="*.weight", first_moment=ls.Drop(), second_moment=ls.SM3())])),
    ),
    "default": ("default policy", _compressed(lambda ls: ls.default_policy())),
    "adagrad": ("Adagrad, exact", lambda model: [Adagrad(model.parameters(), lr=0.1)]),
    "adagrad_default": ("Adagrad, default policy", _compressed(lambda ls: ls.default_policy(), adagrad=True)),
}


def measure(name: str, batch: int) -> dict[str, Any]:
    """Bytes of one training in this process."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    _reset_peak()
    imported = _status("VmRSS")
    model = Model()
    optimizers = METHODS[name][1](model)
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    phases = {"forward and backward": 0, "step": 0}
    gradients = temporaries = 0
    for _ in range(STEPS):
        ids = _words(LENGTH + 1, batch)
        _reset_peak()
        _loss(model, ids).backward()  # type: ignore[no-untyped-call]
        phases["forward and backward"] = max(phases["forward and backward"], _status("VmHWM") - imported)
        gradients = sum(_gradient_bytes(parameter) for parameter in model.parameters())
        _reset_peak()
        held = _status("VmRSS")
        for optimizer in optimizers:
            optimizer.step()
        phases["step"] = max(phases["step"], _status("VmHWM") - imported)
        temporaries = _status("VmHWM") - held  # of the last step, when states exist
        for optimizer in optimizers:
            optimizer.zero_grad()
    states = sum(
        value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    return {
        "label": METHODS[name][0],
        "parameters": parameters,
        "gradients": gradients,
        "states": states,
        "peak": max(phases.values()),
        "phases": phases,
        "step_temporaries": temporaries,
    }


def _loss(model: Model, ids: Tensor) -> Tensor:
    target = ids[1:].flatten()
    negatives = _words(SAMPLED).sort().values
    rows = model.softmax(torch.cat([target, negatives]))
    log_expected = torch.zeros(()).expand(WORDS)  # no correction: memory is the same
    features = model(ids[:-1]).flatten(0, 1)
    return sampled_softmax_loss(features, rows[: len(target)], rows[len(target) :], target, negatives, log_expected)


def _words(*shape: int) -> Tensor:
    """Ids by Zipf's law with exponent 1: uniform in the logarithm of the rank."""
    rank = torch.exp(torch.rand(shape, dtype=torch.float64) * torch.log(torch.tensor(WORDS + 1.0, dtype=torch.float64)))
    return rank.long().sub_(1).clamp_(0, WORDS - 1)


def _gradient_bytes(parameter: nn.Parameter) -> int:
    gradient = parameter.grad
    if gradient is None:
        return 0
    parts = [gradient._indices(), gradient._values()] if gradient.is_sparse else [gradient]
    return sum(part.numel() * part.element_size() for part in parts)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    """Bytes, from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table of docs/quality.md."""
    lines = [
        "| optimizer | parameters | states | gradients | temporaries of a step | peak | of SGD's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        numbers = [row[key] for key in ("parameters", "states", "gradients", "step_temporaries", "peak")]
        columns = [row["label"], *(f"{number / MIB:,.0f}" for number in numbers)]
        lines.append(f"| {' | '.join(columns)} | {row['peak'] / rows['sgd']['peak']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="names, comma-separated; default: all")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.batch)))
        return
    path = RESULTS / "billion_word.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"batch": arguments.batch, "rows": {}}
    if stored["batch"] != arguments.batch:
        stored = {"batch": arguments.batch, "rows": {}}
    for name in arguments.methods.split(","):
        command = [sys.executable, "-m", "benchmarks.billion_word", "--one", name, "--batch", str(arguments.batch)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        stored["rows"][name] = json.loads(found)
        path.write_text(json.dumps(stored, indent=1) + "\n")
        print(name, found, flush=True)
    stored["rows"] = {name: stored["rows"][name] for name in METHODS if name in stored["rows"]}
    path.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored["rows"]))


if __name__ == "__main__":
    main()
