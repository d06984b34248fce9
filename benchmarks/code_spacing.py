"""How codes of 8 and 4 bits are best spaced: errors of Adam's update by states that are stored in them.

The Transformer of :mod:`benchmarks.tied_transformer` is trained by exact AdamW. Beside it both moments of its tied
table and of one hidden matrix are kept in codes of each spacing, in blocks of 128 elements, and rounded at random.
Compared are the updates: the relative distance from the exact one, the mean over the last half of the steps. An update
goes by the states before they are rounded, as `Quantized`'s do.

    python -m benchmarks.code_spacing          # -> results/code_spacing.json, docs/design.md; two minutes
    python -m benchmarks.code_spacing --tables
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from benchmarks import exact_training
from benchmarks.exact_training import EPS
from benchmarks.pages import DOCS, write_tables
from benchmarks.summary import RESULTS, environment

BETA1, BETA2 = 0.9, 0.999
BLOCK, STEPS = 128, 100
OCTAVES = 24
LAYERS = {"words.weight": "tied table", "blocks.1.down.weight": "hidden matrix"}
PAGE = DOCS / "design.md"


@dataclass(frozen=True)
class Spacing:
    """What share of a block's largest magnitude a code means, code and share from 0 to 1, and the way back."""

    label: str
    share: Callable[[Tensor], Tensor]
    code: Callable[[Tensor], Tensor]


def _power(label: str, power: int) -> Spacing:
    return Spacing(label, lambda code: code**power, lambda share: share ** (1 / power))


SPACINGS = {
    "even": _power("evenly", 1),
    "root": _power("by the square root", 2),
    "fourth": _power("by the fourth root", 4),
    "logarithm": Spacing(
        f"by the logarithm, over {OCTAVES} octaves",
        lambda code: torch.exp2(OCTAVES * (code - 1)).where(code > 0, 0.0),
        lambda share: (share.log2() / OCTAVES + 1).clamp(min=0),
    ),
}
#: Bits, spacing, and whether a second moment has a code for 0.
CASES = [(bits, spacing, False) for bits in (8, 4) for spacing in SPACINGS] + [(8, "root", True), (4, "root", True)]


class Codes:
    """A state in codes; decoded between steps."""

    def __init__(self, bits: int, spacing: Spacing, *, signed: bool, zero: bool) -> None:
        self.spacing, self.lowest = spacing, 0 if signed or zero else 1
        self.largest = (1 << (bits - signed)) - (signed or zero)

    def rounded(self, values: Tensor) -> Tensor:
        """What is read of them at the next step."""
        blocks = values.reshape(-1, BLOCK)
        largest = blocks.abs().amax(1, keepdim=True)
        shares = torch.nan_to_num(blocks.abs() / largest)
        below = (self.spacing.code(shares) * self.largest).floor().clamp(self.lowest, self.largest - 1)
        low, high = self._share(below), self._share(below + 1)
        up = torch.rand_like(shares) * (high - low) < shares - low  # the expectation is exact
        return (torch.where(up, high, low) * largest * blocks.sign()).reshape(values.shape)

    def _share(self, code: Tensor) -> Tensor:
        return self.spacing.share(code / self.largest)


class Adam:
    """Both moments of one layer in codes, or exact."""

    def __init__(self, shape: torch.Size, codes: tuple[Codes, Codes] | None) -> None:
        self.codes, self.first, self.second = codes, torch.zeros(shape), torch.zeros(shape)

    def update(self, gradient: Tensor, step: int) -> Tensor:
        """In learning rates."""
        first = self.first.lerp(gradient, 1 - BETA1)
        second = self.second.lerp(gradient.square(), 1 - BETA2)
        self.first, self.second = first, second
        if self.codes is not None:
            self.first, self.second = self.codes[0].rounded(first), self.codes[1].rounded(second)
        return first / (1 - BETA1**step) / ((second / (1 - BETA2**step)).sqrt() + EPS)


def measure(steps: int) -> list[dict[str, object]]:
    """Errors by case and layer."""
    model, optimizer, with_gradients = exact_training.make(steps)
    params = {name: param for name, param in model.named_parameters() if name in LAYERS}
    exact = {name: Adam(param.shape, None) for name, param in params.items()}
    coded = {(case, name): Adam(param.shape, _codes(*case)) for case in CASES for name, param in params.items()}
    errors: dict[tuple[tuple[int, str, bool], str], list[float]] = {key: [] for key in coded}
    for step in with_gradients:
        for name, param in params.items():
            assert param.grad is not None
            wanted = exact[name].update(param.grad, step + 1)
            for case in CASES:
                found = coded[case, name].update(param.grad, step + 1)
                if step >= steps // 2:
                    errors[case, name].append(float((found - wanted).norm() / wanted.norm()))
        optimizer.step()
    return [
        {"bits": bits, "spacing": spacing, "zero": zero, "layer": name, "error": mean(found)}
        for ((bits, spacing, zero), name), found in errors.items()
    ]


def _codes(bits: int, spacing: str, zero: bool) -> tuple[Codes, Codes]:
    first = Codes(bits, SPACINGS[spacing], signed=True, zero=True)
    return first, Codes(bits, SPACINGS[spacing], signed=False, zero=zero)


def table(cases: list[dict[str, object]]) -> str:
    found = {(each["bits"], each["spacing"], each["zero"], each["layer"]): each["error"] for each in cases}
    columns = [(bits, layer) for bits in (8, 4) for layer in LAYERS]
    heads = " | ".join(f"{bits} bits, {LAYERS[layer]}" for bits, layer in columns)
    lines = [f"| codes are spaced | {heads} |", "|---" * (1 + len(columns)) + "|"]
    for spacing, zero in dict.fromkeys((spacing, zero) for _, spacing, zero in CASES):
        label = SPACINGS[spacing].label + (", and a second moment has a code for 0" if zero else "")
        cells = (f"{found[bits, spacing, zero, layer]:.2g}" for bits, layer in columns)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tables", action="store_true", help="only write the table of docs/design.md")
    arguments = parser.parse_args()
    path = RESULTS / "code_spacing.json"
    if not arguments.tables:
        torch.set_num_threads(1)
        cases = measure(arguments.steps)
        stored = {"environment": environment(), "steps": arguments.steps, "cases": cases}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    shown = table(json.loads(path.read_text())["cases"])
    write_tables(PAGE, {"code_spacing": shown})


if __name__ == "__main__":
    main()
