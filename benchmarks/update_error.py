"""How far updates by rounded states are from exact ones, on the same gradients.

The Transformer of `tied_transformer` is trained by exact AdamW; beside it, other optimizers are given its parameters
and gradients at every step, and keep their own states. Compared is what each adds to a layer's parameters.

    python -m benchmarks.update_error --steps 200
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import gcide, tied_transformer
from benchmarks.causal_lm import draw_sequences, loss_of
from benchmarks.precision import bfloat16_products
from benchmarks.tied_methods import METHODS, build
from benchmarks.tied_transformer import BATCH, CONTEXT, LARGEST_NORM, SCHEDULES

COMPARED = ("all_bf16", "all_8bit", "all_4bit")
LR = 2e-3
EPS = 1e-8
EVERY = 50  # steps
LAYERS = ("words.weight", "blocks.0.qkv.weight", "blocks.1.down.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of updates by rounded states")
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    corpus = gcide.load(max_words=tied_transformer.WORDS)
    batches = draw_sequences(corpus.train, steps * BATCH, np.random.default_rng(0), CONTEXT)
    torch.manual_seed(0)
    model, beside = tied_transformer.make_model(corpus.vocabulary), tied_transformer.make_model(corpus.vocabulary)
    exact = build(METHODS["adamw"], model, model.words, lr=LR, eps=EPS)
    others = {name: build(METHODS[name], beside, beside.words, lr=LR, eps=EPS) for name in COMPARED}
    for step in range(steps):
        for optimizer in (exact, *others.values()):
            for group in optimizer.param_groups:
                group["lr"] = LR * SCHEDULES["linear"](step)
        with bfloat16_products():
            loss_of(model, batches[step * BATCH : (step + 1) * BATCH]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        exact.step()
        wanted = updates(model, before)
        for name, optimizer in others.items():
            for parameter, source, old in zip(beside.parameters(), model.parameters(), before, strict=True):
                parameter.data.copy_(old)
                parameter.grad = source.grad
            optimizer.step()
            if (step + 1) % EVERY == 0:
                found = updates(beside, before)
                for layer in LAYERS:
                    print(f"{step + 1:4} {layer:22} {name:10} {compared(found[layer], wanted[layer])}", flush=True)
        exact.zero_grad()


def updates(model: nn.Module, before: list[Tensor]) -> dict[str, Tensor]:
    """What a step added to each parameter."""
    return {
        name: parameter.detach() - old for (name, parameter), old in zip(model.named_parameters(), before, strict=True)
    }


def compared(found: Tensor, wanted: Tensor) -> str:
    """Relative distance, and the length along what was wanted."""
    distance = float((found - wanted).norm() / wanted.norm())
    along = float((found * wanted).sum() / wanted.square().sum())
    return f"off by {distance:.2%}, along the exact update {along:.4f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
