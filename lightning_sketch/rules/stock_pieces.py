"""An optimizer's own step over some of its parameters at a time, as if it were one step over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Some parameters, by the number of their group.
Piece = Mapping[int, Sequence[Tensor]]


def step_in_pieces(optimizer: Any, pieces: Iterable[Piece], step: Callable[[Piece], None]) -> None:
    """Call ``step(piece)`` for every piece, while the optimizer's groups hold that piece alone.

    What a step counts once for a whole group or optimizer, numbers among its options and attributes, is for each piece
    as it was before the first, and in the end as the last left it. (Where a step computes such a number from all
    parameters, its pieces do not make up the whole; see `steps_apart`.)
    """
    groups = optimizer.param_groups
    options = [_numbers(group) for group in groups]
    own = _numbers(vars(optimizer))
    for i, piece in enumerate(pieces):
        if i:
            _put_back(vars(optimizer), own)
            for number in piece:
                _put_back(groups[number], options[number])
        with _only(optimizer, piece):
            step(piece)


@contextmanager
def _only(optimizer: Any, piece: Piece) -> Iterator[None]:
    groups = optimizer.param_groups
    params = {number: groups[number]["params"] for number in piece}
    try:
        for number, some in piece.items():
            groups[number]["params"] = list(some)
        optimizer.param_groups = [groups[number] for number in piece]
        yield
    finally:
        optimizer.param_groups = groups
        for number, every in params.items():
            groups[number]["params"] = every


def _numbers(options: Mapping[Any, Any]) -> dict[Any, Any]:
    # Of tensors only small ones: a learning rate, Prodigy's d.
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in options.items()
        if isinstance(value, bool | int | float | str | tuple | None) or (type(value) is Tensor and value.numel() == 1)
    }


def _put_back(options: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    for key, value in _numbers(options).items():
        if key not in before:
            del options[key]
        elif isinstance(value, Tensor) and isinstance(before[key], Tensor):
            if not torch.equal(value, before[key]):
                options[key].copy_(before[key])
        elif value is not before[key]:
            options[key] = before[key]
