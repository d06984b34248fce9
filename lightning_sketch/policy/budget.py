"""A policy for a number of bytes: the mildest step of a fixed ladder that fits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_sketch.codecs import BFloat16, Codec, Drop, Factored, Keep, Quantized, RowWise
from lightning_sketch.layers.roles import NamedLayer, RoleHints, named_layers
from lightning_sketch.policy.plan import plan_of
from lightning_sketch.policy.rule import Rule, RuleSet
from lightning_sketch.rules.families import rule_of
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.rules.stock import StockRule
from lightning_sketch.text import human_bytes

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

Ladder = tuple[tuple[Codec, Codec], ...]

#: Codecs of (first moment, second moment), mildest first. Tables go down before hidden layers are touched: in
#: docs/quality.md every step of their ladder is within a per cent of the exact optimizer, or better. CountSketch is no
#: step of it: it takes more and is worse. Nor are 8 or 4 bits of both moments: a first moment in as many bits beside a
#: second one in rows and columns takes half, and is as good.
TABLE_LADDER: Ladder = (
    (Keep(), Keep()),
    (BFloat16(), BFloat16()),
    (BFloat16(), Factored(floor=1.0)),
    (Quantized(), Factored(floor=1.0)),
    (Drop(), Factored(floor=1.0)),
)
#: After the hidden layers: what is left to save of tables is less than a number per row, and costs quality.
SMALLEST_TABLES: tuple[Codec, Codec] = (Drop(), RowWise(compression=10))
HIDDEN_LADDER: Ladder = (
    (Keep(), Keep()),
    (BFloat16(), BFloat16()),
    (BFloat16(), Factored()),
    (Quantized(), Factored()),
    (Drop(), Factored()),
)
#: Of optimizers without a rule of ours, whose states must be stored element by element.
ELEMENTWISE_LADDER: Ladder = ((Keep(), Keep()), (BFloat16(), BFloat16()), (Quantized(), Quantized()))


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text with a unit.

    >>> parse_bytes("1.5GiB"), parse_bytes("20 MB"), parse_bytes(4096)
    (1610612736, 20000000, 4096)

    Raises:
        ValueError: not a size.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{size!r} is not a size; write it like '1.5GiB', '300MB' or 4096")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def rules_for_budget(
    model: nn.Module, optimizer: Any, budget: int | str, seed: int = 0, role_hints: RoleHints = None
) -> RuleSet:
    """The mildest step of the ladder whose states fit `budget`; see `Policy.for_budget`."""
    limit = parse_bytes(budget)
    least = None
    inner = unwrap(optimizer)
    params = [p for group in inner.param_groups for p in group["params"]]
    counted = {id(p) for p in params if p.requires_grad or inner.state.get(p)}
    layers = [layer for key, layer in named_layers(model, role_hints).items() if key in counted]
    rule = rule_of(inner)
    if not any(rule.states(group) for group in inner.param_groups):
        raise ValueError(f"{type(inner).__name__} keeps no states (is momentum 0?): there is nothing to compress")
    for policy in _ladder(layers, seed, role_hints, elementwise=isinstance(rule, StockRule)):
        needed = plan_of(model, optimizer, policy).bytes_after
        if needed <= limit:
            return policy
        least = needed if least is None else min(least, needed)
    if least is None:
        raise ValueError("the optimizer trains no embedding, softmax or hidden layer of the model, to compress")
    raise ValueError(f"no policy fits {human_bytes(limit)}: the smallest states are {human_bytes(least)}")


def _ladder(layers: Sequence[NamedLayer], seed: int, role_hints: RoleHints, *, elementwise: bool) -> Iterator[RuleSet]:
    """The policies for these layers, mildest first.

    Args:
        elementwise: whether the optimizer takes element-wise codecs only.
    """
    tables = tuple(sorted({role for layer in layers for role in layer.roles & {"embedding", "softmax"}}))
    of_tables, of_hidden = (ELEMENTWISE_LADDER, ELEMENTWISE_LADDER) if elementwise else (TABLE_LADDER, HIDDEN_LADDER)

    def table_rules(first: Codec, second: Codec) -> list[Rule]:
        return [Rule(role=tables, first_moment=first, second_moment=second)] if tables else []

    if tables:
        for step in of_tables:
            yield RuleSet(table_rules(*step), seed, role_hints)
    hidden: list[Rule] = []
    if any("hidden" in x.roles and not x.roles & {"embedding", "softmax"} for x in layers):
        for first, second in of_hidden[bool(tables) :]:
            hidden = [Rule(role="hidden", first_moment=first, second_moment=second)]
            yield RuleSet([*table_rules(*of_tables[-1]), *hidden], seed, role_hints)
    if tables and not elementwise:
        yield RuleSet([*table_rules(*SMALLEST_TABLES), *hidden], seed, role_hints)
