"""What it costs that ranks agree on shared states: collectives, bytes and time of a step.

    python -m benchmarks.agree_cost            # bytes on paper, and times on 2 and 4 gloo ranks
    python -m benchmarks.agree_cost --paper    # bytes only

Bytes are of one rank and one step, sent and received by a ring. FSDP2's own traffic is that of its defaults under bf16:
parameters gathered twice, gradients reduced once, of 2 bytes an element.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lightning_sketch as ls
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.layers.shared import SharedLayer
from lightning_sketch.policy.plan import make_plan
from lightning_sketch.rules.adam import AdamWRule
from lightning_sketch.sharding import Cut
from lightning_sketch.text import table

#: Rows and columns of the large table, and of the one that is timed.
TABLE, TIMED = (262_144, 2_304), (32_768, 256)
#: A decoder of 7 billion parameters (Llama 2 7B): vocabulary, width, inner width and layers.
DECODER = (32_000, 4_096, 11_008, 32)
RANKS = 8
CODECS = {
    "RowWise()": ls.RowWise(),
    "RowWise(compression=10)": ls.RowWise(compression=10),
    "Factored()": ls.Factored(),
    "SM3()": ls.SM3(),
    "CountSketch(sync=True)": ls.CountSketch(sync=True),
}
WARM_UP, ROUNDS = 3, 15


class Block(nn.Module):
    """The matrices of a decoder's layer, without a computation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))


class Decoder(nn.Module):
    """The parameters of `DECODER`."""

    def __init__(self) -> None:
        super().__init__()
        rows, width, inner, depth = DECODER
        self.tokens = nn.Embedding(rows, width)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, rows, bias=False)


def numbers_of(layers: Iterable[LayerRecord], cut: Cut) -> tuple[int, int]:
    """Numbers that all layers put into the buffers of a step: of sums, and of the largest."""
    shared = [SharedLayer(layer.fqn, layer.shape, cut, layer.sharing(cut)) for layer in layers]
    sizes = [layer.sizes for layer in shared if layer.sharing]
    return sum(size for size, _ in sizes), sum(size for _, size in sizes)


def ring(elements: int, width: int, times: int) -> float:
    """Bytes that a rank sends, of `times` passes of all elements around a ring."""
    return times * width * elements * (RANKS - 1) / RANKS


def on_paper() -> Iterator[tuple[str, ...]]:
    """Rows of the table: what is trained, collectives, numbers, bytes a rank sends, and share of FSDP2's."""
    with torch.device("meta"):
        one, decoder = nn.Embedding(*TABLE), Decoder()
    for cut in ("rows", "columns"):
        for name, codec in CODECS.items():
            policy = ls.Policy([ls.Rule(name="*", exp_avg=ls.Drop(), exp_avg_sq=codec)])
            yield (f"{TABLE[0]:,} x {TABLE[1]:,}, {name}, by {cut}", *_row(one, policy, cut))
    for preset in ("tables", "whole-model"):
        policy = ls.Policy.preset(preset)
        yield (f"7B decoder, preset {preset!r}, by rows", *_row(decoder, policy, "rows"))


def _row(model: nn.Module, policy: ls.Policy, cut: Cut) -> tuple[str, ...]:
    optimizer = torch.optim.AdamW(model.parameters())
    made = make_plan(model, optimizer.param_groups, AdamWRule(), policy)
    sums, largest = numbers_of([planned.layer for planned in made.layers if planned.layer.compressed], cut)
    own = ring(sums + largest, 4, 2)
    theirs = ring(sum(param.numel() for param in model.parameters()), 2, 3)
    return str((sums > 0) + (largest > 0)), f"{sums + largest:,}", f"{own:,.0f}", f"{own / theirs:.4%}"


def timed(rank: int, world_size: int) -> dict[str, tuple[float, int]]:
    """Median milliseconds of a step of one table under row shards, and its all-reduces."""
    from torch.distributed.fsdp import fully_shard

    found: dict[str, tuple[float, int]] = {}
    for name, codec in CODECS.items():
        model: Any = nn.Embedding(*TIMED)
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        policy = ls.Policy([ls.Rule(name="*", exp_avg=ls.Drop(), exp_avg_sq=codec)])
        optimizer = ls.compress(torch.optim.AdamW(model.parameters()), model, policy)
        model.weight.grad = torch.randn_like(model.weight)
        calls: list[int] = []
        original = dist.all_reduce

        def counting(tensor: Tensor, *args: Any, calls: list[int] = calls, original: Any = original, **kw: Any) -> Any:
            calls.append(tensor.numel())
            return original(tensor, *args, **kw)

        times = []
        for number in range(WARM_UP + ROUNDS):
            dist.barrier()
            calls.clear()
            dist.all_reduce = counting
            start = time.perf_counter()
            optimizer.step()
            elapsed = time.perf_counter() - start
            dist.all_reduce = original
            times += [elapsed] if number >= WARM_UP else []
        found[name] = 1000 * median(times), len(calls)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--paper", action="store_true", help="no times")
    arguments = parser.parse_args()
    columns = ("what", ">collectives", ">numbers", ">bytes a step", ">of FSDP2's")
    print(table(f"agreeing on {RANKS} ranks, on paper", columns, on_paper()))
    if arguments.paper:
        return
    from tests.ranks import run_ranks  # gloo ranks that do not corrupt memory

    by_ranks = {ranks: run_ranks(timed, ranks)[0] for ranks in (2, 4)}
    rows = ((name, *(f"{by_ranks[n][name][0]:.2f}" for n in by_ranks), str(by_ranks[2][name][1])) for name in CODECS)
    head = ("second moment", *(f">ms, {n} ranks" for n in by_ranks), ">all-reduces")
    print(table(f"a step of {TIMED[0]:,} x {TIMED[1]:,} under row shards", head, rows))


if __name__ == "__main__":
    main()
