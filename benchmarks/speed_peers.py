"""Other libraries' optimizers from their wheels, as they are meant to be called, over one dense float32 table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_sketch as ls
from benchmarks.roofline import dense_bytes
from benchmarks.speed_cases import DENSE, LR, Codecs, Sizes, dense_race
from benchmarks.speed_measure import Contestant

NOT_INSTALLED = "not installed"
Make = Callable[[Iterable[Tensor]], Optimizer]


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Args:
        package: its distribution; ``torch`` for torch's own.
        make: imports it and constructs it; may raise.
        state: bytes per element of a step, of states, read and written.
        passes: how often its algorithm has to read the gradient.
    """

    label: str
    package: str
    make: Make
    state: float
    passes: int = 1


def _adagrad(params: Any) -> Optimizer:
    return torch.optim.Adagrad(params, lr=LR, fused=True)


def _adafactor(params: Any) -> Optimizer:
    return torch.optim.Adafactor(params, lr=LR)


def _ao(name: str) -> Make:
    def make(params: Any) -> Optimizer:
        import torchao.optim

        optimizer: Optimizer = getattr(torchao.optim, name)(params, lr=LR)
        return optimizer

    return make


def _bitsandbytes(params: Any) -> Optimizer:
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=LR)
    return optimizer


def _torch_sm3(params: Any) -> Optimizer:
    from SM3 import SM3

    optimizer: Optimizer = SM3(params, lr=LR)
    return optimizer


def _kozistr(name: str) -> Make:
    def make(params: Any) -> Optimizer:
        import pytorch_optimizer

        optimizer: Optimizer = getattr(pytorch_optimizer, name)(params, lr=LR)
        return optimizer

    return make


PEERS = {
    "torch_adagrad": Peer("torch Adagrad(fused=True)", "torch", _adagrad, state=8),
    "torch_adafactor": Peer("torch Adafactor", "torch", _adafactor, state=0, passes=2),
    "ao8": Peer("torchao AdamW8bit", "torchao", _ao("AdamW8bit"), state=4),
    "ao4": Peer("torchao AdamW4bit", "torchao", _ao("AdamW4bit"), state=2),
    "bnb8": Peer("bitsandbytes AdamW8bit", "bitsandbytes", _bitsandbytes, state=4),
    "torch_sm3": Peer("torch-SM3", "torch-SM3", _torch_sm3, state=0),
    "kozistr_sm3": Peer("pytorch_optimizer SM3", "pytorch_optimizer", _kozistr("SM3"), state=0),
    "kozistr_came": Peer("pytorch_optimizer CAME", "pytorch_optimizer", _kozistr("CAME"), state=8, passes=2),
}
OURS = {
    **{key: DENSE[key] for key in ("rw", "rw10", "sm3", "factored", "rw_bf16", "8bit_both", "cs20_both")},
    "bf16_both": Codecs("BFloat16, both moments", ls.BFloat16(), ls.BFloat16(), state=8),
}


class Absent(Optimizer):
    """In place of a peer that could not be constructed: its step raises what that raised."""

    def __init__(self, params: Iterable[Tensor], error: Exception) -> None:
        super().__init__(params, {})
        self.error = error

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise self.error


def peers(sizes: Sizes, others: Mapping[str, Peer] = PEERS, dtype: torch.dtype = torch.float32) -> list[Contestant]:
    """Fused AdamW, ours, and every other, over one table."""
    entries: list[Contestant] = dense_race(sizes.peers, OURS, dtype)
    table: nn.Embedding = entries[0].keep
    for key, peer in others.items():
        moved = table.weight.numel() * dense_bytes(dtype.itemsize, state=peer.state, passes=peer.passes)
        try:
            optimizer = peer.make(table.parameters())
        except Exception as error:  # not installed, or it refuses: that is the result
            optimizer = Absent(table.parameters(), error)
        label = peer.label if peer.package == "torch" else f"{peer.label} ({version(peer.package)})"
        entries.append(
            Contestant(key, label, optimizer, entries[0].gradients, moved, "adamw", may_fail=True, keep=table)
        )
    return entries


def version(package: str) -> str:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
