"""Other libraries' optimizers on a GPU, from their wheels, as they are meant to be called."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks import speed_peers
from benchmarks.speed_cases import LR, Sizes
from benchmarks.speed_measure import Contestant
from benchmarks.speed_peers import PEERS, Peer


def _flash(params: Any) -> Optimizer:
    """The moments in 8 bits."""
    from flashoptim import FlashAdamW

    optimizer: Optimizer = FlashAdamW(params, lr=LR, master_weight_bits=None)
    return optimizer


def _flash_master(params: Any) -> Optimizer:
    """The same, and 8 more bits for every bfloat16 parameter."""
    from flashoptim import FlashAdamW

    optimizer: Optimizer = FlashAdamW(params, lr=LR, master_weight_bits=24)
    return optimizer


_EIGHT_BITS = {name: PEERS[name] for name in ("ao8", "ao4", "bnb8")}
#: Of float32 parameters.
FLOAT32 = {
    **{name: PEERS[name] for name in ("torch_adafactor", "torch_sm3", "kozistr_sm3", "kozistr_came")},
    **_EIGHT_BITS,
    "flash": Peer("FlashOptim FlashAdamW", "flashoptim", _flash, state=4),
}
#: Of bfloat16 parameters; FlashOptim warns against its states without the further bits.
BFLOAT16 = {
    **_EIGHT_BITS,
    "flash": Peer("FlashOptim FlashAdamW, 24-bit weights", "flashoptim", _flash_master, state=6),
}


def peers(sizes: Sizes) -> list[Contestant]:
    """Fused AdamW, ours, and every peer, over one float32 table."""
    return speed_peers.peers(sizes, FLOAT32)


def peers_bf16(sizes: Sizes) -> list[Contestant]:
    """The same over one table of bfloat16 parameters and gradients."""
    return speed_peers.peers(sizes, BFLOAT16, torch.bfloat16)
