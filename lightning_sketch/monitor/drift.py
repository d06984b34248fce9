"""When a layer's states have drifted too far from exact ones, and the error that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_sketch.monitor.figures import LayerFigures

#: What happens to a layer past the threshold.
OnDrift = Literal["log", "warn", "raise", "widen", "keep"]


@dataclass(frozen=True)
class Threshold:
    """How far a layer's figures may go; past any of these it has drifted.

    Figures of the update count where two in a row are past: they are of one step, in which a single rare row may be
    most of the exact update. Defaults are beyond what policies that train well were seen to have; see the guide.

    Args:
        first_moment: largest relative error of a stored moment that may be negative. At 1 zeros are as near.
        second_moment: the same of one that may not. A factor common to all rows is a change of the learning rate by its
            root, so such a moment may be further off.
        cosine: smallest cosine between the update by stored states and the exact one.
        norm_ratio: by how much their norms may differ, either way: between ``1 / norm_ratio`` and `norm_ratio`.

    Raises:
        ValueError: a number is out of range.
    """

    first_moment: float = 1.0
    second_moment: float = 4.0
    cosine: float = 0.5
    norm_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("first_moment", "second_moment"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Threshold({name}={getattr(self, name)}): must be > 0")
        if not -1 <= self.cosine <= 1:
            raise ValueError(f"Threshold(cosine={self.cosine}): must be in [-1, 1]")
        if not self.norm_ratio >= 1:
            raise ValueError(f"Threshold(norm_ratio={self.norm_ratio}): must be >= 1")

    def moments_past(self, figures: LayerFigures) -> list[str]:
        """Which stored moments are past the threshold, in words; NaN is."""
        largest = {True: self.first_moment, False: self.second_moment}
        return [
            f"{state} error {error:.3g} (at most {largest[figures.signed[state]]:g})"
            for state, error in figures.errors.items()
            if not error <= largest[figures.signed[state]]
        ]

    def update_past(self, figures: LayerFigures) -> list[str]:
        """What of the update is past the threshold, in words; NaN is, and nothing where there is no figure."""
        wrong: list[str] = []
        cosine, ratio = figures.cosine, figures.norm_ratio
        if cosine is not None and not cosine >= self.cosine:
            wrong.append(f"update cosine {cosine:.3g} (at least {self.cosine:g})")
        if ratio is not None and not 1 / self.norm_ratio <= ratio <= self.norm_ratio:
            wrong.append(f"update norm ratio {ratio:.3g} ({1 / self.norm_ratio:.3g} to {self.norm_ratio:g})")
        return wrong


class StateDrift(RuntimeError):
    """Compressed states of some layers are too far from exact ones; the message names layers and figures."""
