"""How far elements of a pretrained model's tied table go in a step, by second moments of one codec and another.

SmolLM2-135M is trained by exact AdamW as in :mod:`benchmarks.fine_tuning`. Beside it the squares of the table's
gradient are kept exactly, as row means and column means, and as row means alone. Compared is the gradient divided by
the root of each, which is the step of an optimizer without a first moment, in learning rates: rows of the step's tokens
and all the others apart.

    pip install -e .[benchmark,transformers] gguf
    python -m benchmarks.step_lengths --steps 80
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks import smollm2
from benchmarks.fine_tuning import BATCH, EPS, HELD_OUT, LENGTH, START_LR, STEPS

BETA2 = 0.999
SHOWN = (1, 5, 20, 80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=SHOWN[-1])
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = smollm2.load()
    model.train()
    ids, labels = smollm2.articles(HELD_OUT + steps * BATCH, LENGTH)
    table = model.get_input_embeddings().weight
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    second = torch.zeros_like(table)
    print("| step | second moment | this step's tokens: longest, rms, cosine with exact | other rows |")
    print("|---|---|---|---|")
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = START_LR * min(1.0, step / (STEPS // 10))
        rows = slice(HELD_OUT + (step - 1) * BATCH, HELD_OUT + step * BATCH)
        model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        gradient = table.grad
        second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        if step in SHOWN:
            tokens = torch.zeros(len(table), dtype=torch.bool)
            tokens[ids[rows].unique()] = True
            show(step, gradient, second, tokens)
        optimizer.step()
        optimizer.zero_grad()


def show(step: int, gradient: Tensor, second: Tensor, tokens: Tensor) -> None:
    row, column = second.mean(1, keepdim=True), second.mean(0)
    correction = 1 - BETA2**step
    exact = length(gradient, second, correction)
    product = row * column / row.mean()
    estimates = {"exact": second, "Factored": product, "Factored(floor=1)": product + column, "RowWise": row}
    for name, estimate in estimates.items():
        print(line(step, name, length(gradient, estimate, correction), exact, tokens), flush=True)


def length(gradient: Tensor, second: Tensor, correction: float) -> Tensor:
    """Of each element the step of an optimizer without a first moment, in learning rates."""
    return gradient / ((second / correction).sqrt() + EPS)


def line(step: int, name: str, found: Tensor, exact: Tensor, tokens: Tensor) -> str:
    cells = []
    for rows in (tokens, ~tokens):
        a, b = found[rows].double(), exact[rows].double()
        cosine = float((a * b).sum() / (a.norm() * b.norm()))
        cells.append(f"{float(a.abs().max()):.1f}, {float(a.square().mean().sqrt()):.2f}, {cosine:.2f}")
    return f"| {step} | {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
