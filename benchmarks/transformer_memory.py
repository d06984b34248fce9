"""The largest batch of a Transformer with a large table, by optimizer, below one memory cap.

32,000 words, tied to the softmax, 4 layers of width 256, sentences of 16 words, full softmax: 11 M parameters with
dense gradients, three quarters of them in the table. The cap is about what AdamW needs for 16 sentences. SM3's paper
trains twice Adam's batch in the same memory.

    python -m benchmarks.transformer_memory --threads 1          # results/transformer_memory.json
    python -m benchmarks.transformer_memory --time               # how long an epoch takes; wants a quiet machine
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Adafactor, Adagrad, AdamW, Optimizer

from benchmarks.causal_lm import CausalLM, loss_of
from benchmarks.largest_batch import Step, Study
from benchmarks.memory_cap import MIB

WORDS = 32_000
WIDTH = 256
LAYERS = 4
HEADS = 4
LENGTH = 16  # words

Make = Callable[[nn.Module], Optimizer]


def _adamw(policy: Callable[[Any], Any] | None = None, *, in_backward: bool = False) -> Make:
    def optimizer(model: nn.Module) -> Optimizer:
        exact = AdamW(model.parameters(), lr=1e-3, fused=True)
        if policy is None:
            return exact
        import lightning_sketch as ls

        made: Optimizer = ls.compress(exact, model, policy(ls), step_in_backward=in_backward)
        return made

    return optimizer


def _sm3(momentum: float) -> Make:
    def optimizer(model: nn.Module) -> Optimizer:
        import lightning_sketch as ls

        policy = ls.Policy([ls.Rule(name="*", sum=ls.SM3(momentum=momentum))])
        return ls.compress(Adagrad(model.parameters(), lr=0.1), model, policy)

    return optimizer


def _sm3_bf16(ls: Any) -> Any:
    role = ("embedding", "hidden")
    return ls.Policy([ls.Rule(role=role, first_moment=ls.BFloat16(), second_moment=ls.SM3())])


METHODS: dict[str, tuple[str, Make]] = {
    "adamw": ("AdamW, exact", _adamw()),
    "adagrad": ("Adagrad, exact", lambda model: Adagrad(model.parameters(), lr=0.1)),
    "adafactor": ("torch.optim.Adafactor", lambda model: Adafactor(model.parameters(), lr=1e-2)),
    "sm3_momentum": ("SM3, momentum in float32", _sm3(0.9)),
    "sm3_bf16": ("SM3 as AdamW's second moment, first in bfloat16", _adamw(_sm3_bf16)),
    "sm3": ("SM3, no momentum", _sm3(0.0)),
    "default": ("default policy", _adamw(lambda ls: ls.default_policy())),
    "whole_model": ('preset "whole-model"', _adamw(lambda ls: ls.Policy.preset("whole-model"))),
    "whole_model_in_backward": (
        'preset "whole-model", step_in_backward=True',
        _adamw(lambda ls: ls.Policy.preset("whole-model"), in_backward=True),
    ),
}


def make(name: str) -> Step:
    """The model and its optimizer."""
    torch.manual_seed(0)
    model = CausalLM(WORDS, width=WIDTH, heads=HEADS, layers=LAYERS, context=LENGTH)
    optimizer = METHODS[name][1](model)

    def step(sentences: int) -> None:
        loss_of(model, torch.randint(WORDS, (sentences, LENGTH + 1))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


STUDY = Study(
    name="transformer_memory",
    methods={name: label for name, (label, _) in METHODS.items()},
    make=make,
    cap=464 * MIB,
    batch=16,
    examples=320,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
