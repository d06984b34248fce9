"""A GPT of 124 million parameters, trained for some minutes by fused AdamW and then by compressed states.

    python -m benchmarks.gpu_train --tokens runs/tokens.bin         # from benchmarks.gpu_tokens; made if not there
    python -m benchmarks.gpu_train --device cpu --quick             # without a GPU, to try the script itself

Each optimizer begins with the same parameters and sees the same batches. Loss on tokens that are not trained on, tokens
a second, and the most memory go to ``$OUT/train.json`` (``runs/gpu``) as they come. No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import gpu_tokens
from lightning_sketch import Policy, compress, report

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a run.

    Args:
        batch: sequences of a step.
        every: steps between two losses.
        held_out: sequences whose loss is taken.
    """

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    vocabulary: int = gpu_tokens.VOCABULARY
    batch: int = 16
    every: int = 50
    held_out: int = 32
    warm_up: int = 100


FULL, QUICK = Sizes(), Sizes(2, 2, 32, 16, gpu_tokens.VOCABULARY, 2, 2, 2, 2)
LR, WEIGHT_DECAY, BETAS = 6e-4, 0.1, (0.9, 0.95)
#: By name, how an optimizer of these parameters is converted; ``None``: it stays torch's.
METHODS: dict[str, Callable[[], Policy | None] | None] = {
    "adamw": None,
    "default": lambda: None,
    "bf16": lambda: Policy.preset("bf16"),
}


class Block(nn.Module):
    """Attention to what came before, and two linear layers."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.qkv, self.out = nn.Linear(sizes.width, 3 * sizes.width), nn.Linear(sizes.width, sizes.width)
        self.up, self.down = nn.Linear(sizes.width, 4 * sizes.width), nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2's architecture; the softmax layer is the embedding's table."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, param in self.named_parameters():
            if param.ndim > 1:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / (math.sqrt(2 * sizes.layers) if deep else 1))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def batches(tokens: Tensor, sizes: Sizes, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences at random places: ids and what follows each, int64 ``[batch, context]``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - sizes.context - 1, (sizes.batch,), generator=generator)
        both = torch.stack([tokens[start : start + sizes.context + 1] for start in starts.tolist()]).to(torch.int64)
        both = (both.pin_memory() if device.type == "cuda" else both).to(device, non_blocking=True)
        yield both[:, :-1], both[:, 1:]


def train(name: str, tokens: Tensor, sizes: Sizes, device: torch.device, seconds: float) -> Iterator[Row]:
    """Train for some seconds; a row so far at every loss."""
    torch.manual_seed(0)
    model = GPT(sizes).to(device)
    split = len(tokens) - max(len(tokens) // 20, sizes.held_out * (sizes.context + 1) + 1)
    held_out = batches(tokens[split:], sizes, 1, device)
    fixed = [next(held_out) for _ in range(max(1, sizes.held_out // sizes.batch))]
    optimizer: Optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    if (policy := METHODS[name]) is not None:
        optimizer = compress(optimizer, model, policy())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / sizes.warm_up))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses: list[tuple[int, float, float]] = []  # tokens, seconds of training, loss
    trained = 0.0
    ended = False
    data = batches(tokens[:split], sizes, 2, device)
    step = 0
    while not ended:
        began = time.perf_counter()
        for _ in range(sizes.every):
            with _autocast(device):
                loss = model(*next(data))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
        if on_gpu:
            torch.cuda.synchronize()
        trained += time.perf_counter() - began
        ended = trained >= seconds
        losses.append((step * sizes.batch * sizes.context, trained, _loss(model, fixed, device)))
        found = report(optimizer)
        yield {
            "what": name,
            "loss": losses[-1][2],
            "tokens": losses[-1][0],
            "tokens_per_second": losses[-1][0] / trained,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else found.process_peak,
            "state_bytes": found.state,
            "parameters": sum(param.numel() for param in model.parameters()),
            "kernels": found.kernels,
            "losses": losses,
        }


def _autocast(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def _loss(model: GPT, fixed: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    with _autocast(device):
        return float(torch.stack([model(*pair) for pair in fixed]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=Path, help="uint16, of benchmarks.gpu_tokens; default: made")
    parser.add_argument("--methods", default="adamw,default", help=f"of {', '.join(METHODS)}, comma-separated, in turn")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, for each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model for a moment; the figures mean nothing")
    arguments = parser.parse_args()
    names = arguments.methods.split(",")
    if unknown := sorted(set(names) - set(METHODS)):
        raise SystemExit(f"Unknown methods {unknown}; known: {list(METHODS)}")
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)  # it warns about first moments that it drops
    quick, device = arguments.quick, torch.device(arguments.device)
    tokens = gpu_tokens.read(arguments.tokens) if arguments.tokens else gpu_tokens.made(20_000 if quick else 20_000_000)
    out = Path(os.environ.get("OUT") or "runs/gpu") / "train.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    for name in names:
        for row in train(name, tokens, QUICK if quick else FULL, device, 0.5 if quick else 60 * arguments.minutes):
            rows[name] = row
            out.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        row = rows[name]
        print(
            f"{name}: loss {row['loss']:.3f} after {row['tokens']:,} tokens, {row['tokens_per_second']:,.0f} a second, "
            f"at most {row['peak_bytes'] / 2**20:,.0f} MiB, states {row['state_bytes'] / 2**20:,.1f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
