"""Steps of parameters that are offloaded to the CPU: beside DeepSpeedCPUAdam, which ZeRO-Offload brings along.

Over the float32 parameters that DeepSpeed's and FSDP2's offload keep there. DeepSpeed compiles its optimizer when it is
first made, for minutes; it needs a compiler and ninja.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import lightning_sketch as ls
from benchmarks.roofline import dense_bytes
from benchmarks.speed_cases import LR, NONFINITE, Sizes
from benchmarks.speed_measure import Contestant

EXACT = dense_bytes(4, state=16)
#: Bytes per element that a step moves, under the presets: of tables, and of hidden matrices in "whole-model".
FACTORED, FACTORED_8BIT = dense_bytes(4, state=0, passes=2), dense_bytes(4, state=2 * (1 + 4 / 128), passes=2)
BLOCK = {"query": (1, 1), "key": (1, 1), "value": (1, 1), "out": (1, 1), "gate": (3, 1), "up": (3, 1), "down": (1, 3)}


class Decoder(nn.Module):
    """The parameters of a decoder with a tied table: what its optimizer steps."""

    def __init__(self, rows: int, width: int, blocks: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(n * width, m * width, bias=False) for name, (m, n) in BLOCK.items()})
            for _ in range(blocks)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * blocks + 1))
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight


def table(sizes: Sizes) -> list[Contestant]:
    """One table, all of which the default policy compresses."""
    rows, width, _ = sizes.offloaded
    return _race(nn.Embedding(rows, width))


def decoder(sizes: Sizes) -> list[Contestant]:
    """A decoder, whose hidden matrices and norms the default policy leaves to torch."""
    return _race(Decoder(*sizes.offloaded))


def _race(model: nn.Module) -> list[Contestant]:
    params = list(model.parameters())
    gradients = [[torch.randn_like(param) for param in params]]
    numel = sum(param.numel() for param in params)
    in_table = params[0].numel()
    hidden = sum(param.numel() for param in params[1:] if param.ndim == 2)

    def entry(key: str, label: str, optimizer: Optimizer, moved: float, nonfinite: str | None = None) -> Contestant:
        return Contestant(key, label, optimizer, gradients, moved, "cpu_adam", nonfinite, keep=model)

    entries = [
        entry("cpu_adam", "DeepSpeedCPUAdam", cpu_adam(params), numel * EXACT),
        entry("adamw", "AdamW(fused=True)", AdamW(params, lr=LR, fused=True), numel * EXACT),
    ]
    others = numel - in_table - hidden
    policies: dict[str, tuple[str, Callable[[], ls.Policy], float]] = {
        "default": ("default policy", ls.default_policy, in_table * FACTORED + (numel - in_table) * EXACT),
        "whole_model": (
            'preset "whole-model"',
            lambda: ls.Policy.preset("whole-model"),
            in_table * FACTORED + hidden * FACTORED_8BIT + others * EXACT,
        ),
    }
    for key, (label, policy, moved) in policies.items():
        if key == "whole_model" and not hidden:  # then it is the default policy
            continue
        for nonfinite in NONFINITE:
            own = ls.compress(AdamW(params, lr=LR, fused=True), model, policy(), nonfinite=nonfinite)
            entries.append(entry(key, label, own, moved, nonfinite))
    return entries


def cpu_adam(params: list[nn.Parameter]) -> Optimizer:
    """DeepSpeed's AdamW for the CPU, with the hyperparameters of torch's."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The ninja that pip installs lies beside this interpreter, which may have been called by its path.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: Optimizer = DeepSpeedCPUAdam(params, lr=LR, weight_decay=1e-2)
    return optimizer
