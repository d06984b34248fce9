"""A policy for a number of bytes: the mildest step of a fixed ladder that fits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_sketch.codecs import BFloat16, Codec, Drop, Factored, RowWise
from lightning_sketch.plan import plan
from lightning_sketch.policy import Policy, Rule
from lightning_sketch.roles import RoleHints, named_layers
from lightning_sketch.tables import human_bytes

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

#: Codecs of (first moment, second moment), mildest first. Tables go all the way down before hidden layers are touched:
#: in docs/quality.md every step of their ladder is as good as the exact optimizer, or better. CountSketch is no step of
#: it: it takes more than RowWise and is worse.
TABLE_LADDER: tuple[tuple[Codec, Codec], ...] = (
    (BFloat16(), BFloat16()),
    (BFloat16(), RowWise()),
    (Drop(), RowWise()),
    (Drop(), RowWise(compression=10)),
)
HIDDEN_LADDER: tuple[tuple[Codec, Codec], ...] = (
    (BFloat16(), BFloat16()),
    (BFloat16(), Factored()),
    (Drop(), Factored()),
)


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text with a unit.

    >>> parse_bytes("1.5GiB"), parse_bytes("20 MB"), parse_bytes(4096)
    (1610612736, 20000000, 4096)

    Raises:
        ValueError: not a size.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{size!r} is not a size; write it like '1.5GiB', '300MB' or 4096")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def policy_for_budget(
    model: nn.Module, optimizer: Any, budget: int | str, seed: int = 0, role_hints: RoleHints = None
) -> Policy:
    """The mildest policy of the ladder whose states fit `budget`; see `Policy.for_budget`."""
    limit = parse_bytes(budget)
    least = None
    for policy in _ladder(model, seed, role_hints):
        needed = plan(model, optimizer, policy).bytes_after
        if needed <= limit:
            return policy
        least = needed if least is None else min(least, needed)
    if least is None:
        raise ValueError("the model has no embedding, softmax or hidden layer to compress")
    raise ValueError(
        f"no policy fits {human_bytes(limit)}: the smallest states are {human_bytes(least)} (embedding and softmax "
        "tables at a tenth of a number per row, hidden layers factored and without first moment)"
    )


def _ladder(model: nn.Module, seed: int, role_hints: RoleHints) -> Iterator[Policy]:
    roles = {role for layer in named_layers(model, role_hints).values() for role in layer.roles}
    tables = tuple(role for role in ("embedding", "softmax") if role in roles)
    table_rules = [Rule(role=tables, first_moment=m, second_moment=v) for m, v in TABLE_LADDER] if tables else []
    for rule in table_rules:
        yield Policy([rule], seed, role_hints)
    if "hidden" in roles:
        for m, v in HIDDEN_LADDER:
            hidden = Rule(role="hidden", first_moment=m, second_moment=v)
            yield Policy([*table_rules[-1:], hidden], seed, role_hints)
