"""The first step of a new process against its second; prints JSON. Run by :mod:`benchmarks.speed`."""

from __future__ import annotations

import json
import logging
import sys
import time

import torch
from torch import nn

import lightning_sketch as ls


def main(threads: int, kind: str) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)
    model = nn.Sequential(nn.Embedding(20_000, 256), nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if kind == "compressed":
        hidden = ls.Rule(role="hidden", first_moment=ls.BFloat16(), second_moment=ls.Factored())
        table = ls.Rule(role="embedding", exp_avg=ls.Drop(), exp_avg_sq=ls.RowWise(compression=10))
        ls.compress(optimizer, model, ls.Policy([table, hidden]))
    seconds = []
    for _ in range(2):
        model(torch.arange(128)).square().mean().backward()
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        optimizer.zero_grad()
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
