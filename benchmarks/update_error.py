"""How far updates by rounded states are from exact ones, on the same gradients.

The Transformer of `tied_transformer` is trained by exact AdamW; beside it, other optimizers are given its parameters
and gradients at every step, and keep their own states. Compared is what each adds to a layer's parameters.

    python -m benchmarks.update_error --steps 200
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from benchmarks import exact_training
from benchmarks.exact_training import EPS, LR
from benchmarks.tied_methods import METHODS, build

COMPARED = ("all_bf16", "all_8bit", "all_4bit")
EVERY = 50  # steps
LAYERS = ("words.weight", "blocks.0.qkv.weight", "blocks.1.down.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of updates by rounded states")
    parser.add_argument("--steps", type=int, default=200)
    model, exact, with_gradients = exact_training.make(parser.parse_args().steps)
    beside = copy.deepcopy(model)
    others = {name: build(METHODS[name], beside, beside.words, lr=LR, eps=EPS) for name in COMPARED}
    for step in with_gradients:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        exact.step()
        wanted = updates(model, before)
        for name, optimizer in others.items():
            for group in optimizer.param_groups:
                group["lr"] = exact.param_groups[0]["lr"]
            for parameter, source, old in zip(beside.parameters(), model.parameters(), before, strict=True):
                parameter.data.copy_(old)
                parameter.grad = source.grad
            optimizer.step()
            if (step + 1) % EVERY == 0:
                found = updates(beside, before)
                for layer in LAYERS:
                    print(f"{step + 1:4} {layer:22} {name:10} {compared(found[layer], wanted[layer])}", flush=True)


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
