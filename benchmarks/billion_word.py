"""Peak memory of the 1-Billion-Word language model at the size of the count-sketch paper, by optimizer.

793,471 words, embedding 256, LSTM 2,048 projected to 256, sampled softmax over 8,192 words, 20 words back, batches of
1,024 (Spring et al., ICML 2019, section 6.3 and table 8). Both tables have sparse gradients. Steps are real; the words
are drawn by Zipf's law, because memory depends on how many are distinct and on nothing else. Each optimizer runs in a
process of its own (`memory_cap`, which also keeps malloc from holding freed memory). A small training of the same kind
comes first, so that libraries are loaded; what the process has then is taken off all figures. The peak is what Linux
counts (``VmHWM``), set back before every phase.

    python -m benchmarks.billion_word                        # results/billion_word.json and the table
    python -m benchmarks.billion_word --methods sgd,default --batch 256
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam

from benchmarks.losses import sampled_softmax_loss
from benchmarks.memory_cap import answer, begin_phase, run_capped, status
from benchmarks.summary import RESULTS

WORDS = 793_471
WIDTH = 256  # of the embedding and of the projection
HIDDEN = 2_048
SAMPLED = 8_192
LENGTH = 20  # words back
BATCH = 1_024
FEW = 8  # sentences of the step that makes the states
SMALL = 20_000  # words of the training that comes first
THREADS = 2
MIB = 2**20


class Model(nn.Module):
    """The paper's model: word ids ``[length, batch]`` -> features ``[length, batch, 256]``."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH, sparse=True)
        self.lstm = nn.LSTM(WIDTH, HIDDEN, proj_size=WIDTH)
        self.softmax = nn.Embedding(words, WIDTH, sparse=True)

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
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    train(name, SMALL, FEW)
    return train(name, WORDS, batch)


def train(name: str, words: int, batch: int) -> dict[str, Any]:
    """Bytes of two steps above what the process has before: one of few sentences, which makes the states, and one."""
    before = begin_phase()
    model = Model(words)
    optimizers = METHODS[name][1](model)
    phases = {"forward": 0, "backward": 0, "step": 0}
    for sentences in (FEW, batch):
        ids = _words(words, LENGTH + 1, sentences)
        held = begin_phase()
        loss = _loss(model, ids)
        phases["forward"] = max(phases["forward"], status("VmHWM") - before)
        activations = begin_phase() - held
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        phases["backward"] = max(phases["backward"], status("VmHWM") - before)
        gradients = sum(_bytes(parameter.grad) for parameter in model.parameters())
        held = begin_phase()
        for optimizer in optimizers:
            optimizer.step()
        phases["step"] = max(phases["step"], status("VmHWM") - before)
        temporaries = status("VmHWM") - held
        for optimizer in optimizers:
            optimizer.zero_grad()
    return {
        "label": METHODS[name][0],
        "parameters": sum(_bytes(parameter) for parameter in model.parameters()),
        "states": sum(
            _bytes(value)
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ),
        "activations": activations,
        "gradients": gradients,
        "step_temporaries": temporaries,
        "phases": phases,
        "peak": max(phases.values()),
    }


def _loss(model: Model, ids: Tensor) -> Tensor:
    target, words = ids[1:].flatten(), model.softmax.num_embeddings
    negatives = _words(words, SAMPLED).sort().values
    rows = model.softmax(torch.cat([target, negatives]))
    log_expected = torch.zeros(()).expand(words)  # no correction: memory is the same
    features = model(ids[:-1]).flatten(0, 1)
    return sampled_softmax_loss(features, rows[: len(target)], rows[len(target) :], target, negatives, log_expected)


def _words(words: int, *shape: int) -> Tensor:
    """Ids by Zipf's law with exponent 1: uniform in the logarithm of the rank."""
    rank = torch.exp(torch.rand(shape, dtype=torch.float64) * math.log(words + 1))
    return rank.long().sub_(1).clamp_(0, words - 1)


def _bytes(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    return sum(_bytes(part) for part in (tensor._indices(), tensor._values())) if tensor.is_sparse else tensor.nbytes


def table(stored: dict[str, Any]) -> str:
    """The table of docs/memory.md, in MiB."""
    rows = stored["methods"]
    parts = ("parameters", "states", "activations", "gradients", "step_temporaries")
    lines = [
        "| optimizer | parameters | states | activations | gradients | temporaries of a step "
        "| peak of backward | peak of the step | peak, of SGD's | of exact Adam's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        numbers = [row[key] for key in parts] + [row["phases"][key] for key in ("backward", "step")]
        columns = [row["label"], *(f"{number / MIB:,.0f}" for number in numbers)]
        columns += [f"{row['peak'] / rows[other]['peak']:.2f}" if other in rows else "" for other in ("sgd", "exact")]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="names, comma-separated; default: all")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        answer(lambda: measure(arguments.one, arguments.batch))
        return
    path = RESULTS / "billion_word.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("batch") != arguments.batch:
        stored = {"batch": arguments.batch, "methods": {}}
    for name in arguments.methods.split(","):
        options = ["--one", name, "--batch", str(arguments.batch)]
        stored["methods"][name] = found = run_capped("benchmarks.billion_word", options, threads=THREADS)
        print(name, found, flush=True)
        stored["methods"] = {name: stored["methods"][name] for name in METHODS if name in stored["methods"]}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored))


if __name__ == "__main__":
    main()
