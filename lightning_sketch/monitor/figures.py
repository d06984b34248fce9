"""From sums over sampled rows, which ranks add up, to the figures of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import key_of, relative_norm
from lightning_sketch.layers.record import LayerPart
from lightning_sketch.monitor.shadow import Stored


@dataclass(frozen=True)
class LayerFigures:
    """How well one layer's states do, on its sampled rows, over all ranks.

    Args:
        errors: of each moment that is stored, ``||stored - exact|| / ||exact||``.
        cosine: of the angle between the update that the stored states give and the exact one; ``None`` where no sampled
            row had a gradient in that step.
        norm_ratio: of the norms of these updates, stored over exact.
        buckets_used: of each sketched moment, the share of buckets that are not 0.
        left_out: how many rows (elements, where all states are element-wise) steps left out so far, because their
            gradients were not finite.
        signed: whether each of these moments may be negative.
    """

    errors: Mapping[str, float]
    cosine: float | None
    norm_ratio: float | None
    buckets_used: Mapping[str, float]
    left_out: int
    signed: Mapping[str, bool]

    def to_dict(self, fqn: str) -> dict[str, float]:
        """The figures for a logger, under ``optimizer_state/<layer>/...``."""
        figures = {f"{state}_error": error for state, error in self.errors.items()}
        if self.cosine is not None and self.norm_ratio is not None:
            figures |= {"update_cosine": self.cosine, "update_norm_ratio": self.norm_ratio}
        figures |= {f"{state}_buckets_used": share for state, share in self.buckets_used.items()}
        figures["left_out"] = float(self.left_out)
        return {f"optimizer_state/{fqn}/{name}": value for name, value in figures.items()}

    def __str__(self) -> str:
        words = [f"{state} error {error:.3g}" for state, error in self.errors.items()]
        if self.cosine is not None and self.norm_ratio is not None:
            words += [f"update cosine {self.cosine:.3g}", f"update norm ratio {self.norm_ratio:.3g}"]
        return ", ".join(words)


@dataclass
class Sums:
    """What one rank has of a layer.

    Args:
        moments: of each state the sums of squares of its error, and of itself.
        update: of the two updates their product, and the sums of squares of the stored one and of the exact one.
        buckets: of each sketch how many buckets are not 0, and how many there are.
        left_out: rows or elements.
        divided: whether other ranks have other rows.
        signed: whether each moment may be negative.
    """

    moments: dict[str, tuple[float, float]] = field(default_factory=dict)
    update: tuple[float, float, float] = (0.0, 0.0, 0.0)
    buckets: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: int = 0
    divided: bool = False
    signed: Mapping[str, bool] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add what another rank has of the same layer. Of replicas everything counts as often, and ratios stay."""
        self.moments = {name: _sum(pair, other.moments[name]) for name, pair in self.moments.items()}
        self.buckets = {name: _sum(pair, other.buckets[name]) for name, pair in self.buckets.items()}
        self.update = _sum(self.update, other.update)
        self.left_out = self.left_out + other.left_out if self.divided else max(self.left_out, other.left_out)

    def figures(self) -> LayerFigures:
        product, stored, exact = self.update
        compared = exact > 0
        return LayerFigures(
            errors={name: relative_norm(error, norm) for name, (error, norm) in self.moments.items()},
            cosine=(product / math.sqrt(stored * exact) if stored > 0 else 0.0) if compared else None,
            norm_ratio=math.sqrt(stored / exact) if compared else None,
            buckets_used={name: used / count for name, (used, count) in self.buckets.items()},
            left_out=self.left_out,
            signed=self.signed,
        )


def over_ranks(every: Iterable[Mapping[str, Sums]]) -> dict[str, LayerFigures]:
    """Figures of all layers, from what each rank has of them; the same on all ranks."""
    totals: dict[str, Sums] = {}
    for of_rank in every:
        for fqn, sums in of_rank.items():
            if fqn in totals:
                totals[fqn].add(sums)
            else:
                totals[fqn] = sums
    return {fqn: sums.figures() for fqn, sums in totals.items()}


def measure(
    part: LayerPart,
    state: Mapping[str, Any],
    stored: Mapping[str, Stored],
    exact: Mapping[str, Tensor],
    updates: tuple[Tensor, Tensor] | None,
) -> Sums:
    """This rank's sums of a layer. Waits for the device, once.

    Args:
        state: the layer's entries of ``optimizer.state[param]``.
        stored, exact: states of the sampled rows, by name.
        updates: by stored and by exact states; ``None`` if the layer was not stepped.
    """
    numbers: list[Tensor] = []
    for name, found in stored.items():
        numbers += [_squares(found.values - exact[name]), _squares(exact[name])]
    if updates is not None:
        ours, true = updates
        numbers += [_dot(ours, true), _squares(ours), _squares(true)]
    tables: dict[str, int] = {}
    for name, codec in part.layer.persistent_codecs().items():
        if shape := codec.table_shape(part.shard) or codec.row_table_shape(part.shard):
            tables[name] = shape[0] * shape[1]
            buckets = state[key_of(name, "table")].reshape(tables[name], -1)
            used = (torch.linalg.vector_norm(buckets, ord=torch.inf, dim=1) != 0).sum()
            numbers.append(used.to(torch.float64))
    read = iter(torch.stack(numbers).tolist() if numbers else [])
    return Sums(
        moments={name: (next(read), next(read)) for name in stored},
        update=(0.0, 0.0, 0.0) if updates is None else (next(read), next(read), next(read)),
        buckets={name: (int(next(read)), count) for name, count in tables.items()},
        divided=part.shard.local_rows != part.shard.global_rows,
        signed=dict(part.layer.signed),
    )


def _squares(x: Tensor) -> Tensor:
    return _dot(x, x)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.to(torch.float64) * y.to(torch.float64)).sum()


def _sum(these: Any, those: Any) -> Any:
    return tuple(a + b for a, b in zip(these, those, strict=True))
