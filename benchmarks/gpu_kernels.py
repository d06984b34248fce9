"""How long each kernel of a step takes on a GPU, by torch's profiler: one large table, every codec.

python -m benchmarks.gpu_kernels
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import launches
from benchmarks.gpu_check import CODECS, policy
from lightning_sketch import compress, decompress
from lightning_sketch.kernels import unproved

WARM_UP, STEPS, SHOWN = 2, 3, 7


def kernels_of(optimizer: Optimizer) -> list[tuple[str, float, int]]:
    """Kernels of a step: name, milliseconds, how often; the longest first."""
    for _ in range(WARM_UP):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(STEPS):
            optimizer.step()
        torch.cuda.synchronize()
    events: list[Any] = [event for event in recorded.key_averages() if event.device_time_total > 0]
    found = [(event.key[:40], event.device_time_total / 1e3 / STEPS, event.count // STEPS) for event in events]
    return sorted(found, key=lambda kernel: -kernel[1])


def main() -> None:
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)  # it warns about first moments that it drops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces every start
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Embedding(*launches.LARGE, device="cuda", dtype=dtype)
        model.weight.grad = torch.randn_like(model.weight) * 1e-2
        fused = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        _show(dtype, "torch AdamW(fused=True)", fused)
        fused.state.clear()
        for name in CODECS:
            optimizer = compress(torch.optim.AdamW(model.parameters(), lr=1e-3), model, policy(name))
            _show(dtype, name, optimizer)
            decompress(optimizer).state.clear()
    for kind, problem in unproved.items():
        print(f"not proved on {kind}: {problem}")


def _show(dtype: torch.dtype, name: str, optimizer: Optimizer) -> None:
    found = kernels_of(optimizer)
    total = sum(milliseconds for _, milliseconds, _ in found)
    parts = ", ".join(f"{kernel} {milliseconds:.3f} x{count}" for kernel, milliseconds, count in found[:SHOWN])
    print(f"{str(dtype).removeprefix('torch.')}, {name}: {total:.3f} ms: {parts}", flush=True)


if __name__ == "__main__":
    main()
