"""Rules under a name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_sketch.codecs import BFloat16, Drop, Factored, Quantized
from lightning_sketch.policy.rule import Rule


def tables() -> list[Rule]:
    """Tables of 10,000 rows or more: no first moment, row and column means with a floor; the rest exactly."""
    return [
        Rule(
            role=("embedding", "softmax"),
            min_rows=10_000,
            optional=True,
            exp_avg=Drop(),
            first_moment=BFloat16(),
            second_moment=Factored(floor=1.0),
        )
    ]


def whole_model() -> list[Rule]:
    """Large tables as in "tables"; of all other matrices an 8-bit first and a factored second moment, 1 B/param."""
    first, second = Quantized(), Factored()
    return [*tables(), Rule(role=("embedding", "softmax", "hidden"), first_moment=first, second_moment=second)]


def bf16() -> list[Rule]:
    """Both moments of every table and matrix in bfloat16, rounded stochastically: 4 B/param."""
    return [Rule(role=("embedding", "softmax", "hidden"), first_moment=BFloat16(), second_moment=BFloat16())]


def eight_bits() -> list[Rule]:
    """Both moments of every table and matrix in 8 bits: 2.06 B/param."""
    return [Rule(role=("embedding", "softmax", "hidden"), first_moment=Quantized(), second_moment=Quantized())]


#: By the names that `Policy.preset` takes.
PRESETS: dict[str, Callable[[], list[Rule]]] = {
    "tables": tables,
    "whole-model": whole_model,
    "bf16": bf16,
    "8bit": eight_bits,
}
