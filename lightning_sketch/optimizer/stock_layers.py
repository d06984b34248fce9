"""One step of an optimizer without a rule: decode a few layers, have its own step step them, encode them again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lightning_sketch.layers.record import LayerPart
from lightning_sketch.layers.stock_states import decode_entry, encode_entry, stored_step
from lightning_sketch.optimizer import stock_step
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.rules.stock_pieces import Piece, step_in_pieces
from lightning_sketch.sharding.dtensor import sharding_of

#: Bytes of decoded states that exist at once; a layer with more is a piece by itself.
PIECE_BYTES = 256 << 20

Layers = dict[Tensor, tuple[dict[str, Any], LayerPart]]


@_disable_dynamo
def step(optimizer: CompressedGroups, closure: Callable[[], Any] | None, apart: Callable[[], bool]) -> Any:
    """One step; what the closure returned.

    Args:
        apart: whether layers may be stepped a few at a time; asked where some are to be stepped.
    """
    layers: Layers = {param: (group, parts[0]) for group, param, parts in optimizer.compressed_tensors()}
    for group, part in layers.values():
        optimizer.rule.check(group, part.layer.fqn)
        part.check_shape()
    if not layers or not apart():
        with _Decoded(optimizer, layers):
            return stock_step.run(optimizer, *(() if closure is None else (closure,)))
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()

    def step_piece(piece: Piece) -> None:
        here = [p for params in piece.values() for p in params if p in layers and p.grad is not None]
        with _Decoded(optimizer, {p: layers[p] for p in here}):
            stock_step.run(optimizer)

    step_in_pieces(optimizer, list(pieces(optimizer, layers)), step_piece)
    return loss


def pieces(optimizer: CompressedGroups, layers: Layers) -> Iterator[Piece]:
    """The parameters of all groups, cut by `PIECE_BYTES`; first those that need not be decoded. Alike on all ranks."""
    at_once: dict[int, list[Tensor]] = {}
    others: list[tuple[int, Tensor]] = []
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param in layers and param.grad is not None:
                others.append((number, param))
            else:
                at_once.setdefault(number, []).append(param)
    if at_once:
        yield at_once
    piece: dict[int, list[Tensor]] = {}
    total = 0
    for number, param in others:
        size = decoded_bytes(layers[param][1], param)
        if piece and total + size > PIECE_BYTES:
            yield piece
            piece, total = {}, 0
        piece.setdefault(number, []).append(param)
        total += size
    if piece:
        yield piece


def decoded_bytes(part: LayerPart, param: Tensor) -> int:
    """Bytes of a layer's states that its step has decoded; of shards, of the largest."""
    count = sum(not codec.exact for codec in part.layer.codecs.values())
    shards, _ = sharding_of(param, part.layer.fqn)
    return count * param.element_size() * math.ceil(param.numel() / shards)


def most_decoded_bytes(optimizer: CompressedGroups, apart: bool) -> int:
    """Upper bound of the bytes of decoded states that exist at once."""
    sizes = [decoded_bytes(parts[0], param) for _, param, parts in optimizer.compressed_tensors()]
    total = sum(sizes)
    return min(total, max(PIECE_BYTES, max(sizes, default=0))) if apart else total


class _Decoded:
    """Layers whose states are dense meanwhile."""

    def __init__(self, optimizer: CompressedGroups, layers: Layers) -> None:
        self._optimizer, self._layers = optimizer, layers
        self._steps: dict[Tensor, float] = {}

    def __enter__(self) -> None:
        states = self._optimizer.state
        for param, (group, part) in self._layers.items():
            if param in states:
                self._steps[param] = stored_step(states[param])
                decode_entry(part, param, group, states[param])

    def __exit__(self, error: Any, *_: Any) -> None:
        states = self._optimizer.state
        for param, (group, part) in self._layers.items():
            if entry := states.get(param):
                made = 0 if error is not None or param.grad is None else 1
                count = self._steps.get(param, 0.0) + made
                step = stored_step(entry) if "step" in entry else count
                encode_entry(part, param, group, entry, step)
