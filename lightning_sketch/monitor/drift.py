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

    The defaults are loose: see the guide for figures of sketches and row means that train well, which are closer than
    that, and of sketches that are too small, which are not.

    Args:
        error: largest relative error of a stored moment.
        cosine: smallest cosine between the update by stored states and the exact one.
        norm_ratio: by how much their norms may differ, either way: between ``1 / norm_ratio`` and `norm_ratio`.

    Raises:
        ValueError: a number is out of range.
    """

    error: float = 10.0
    cosine: float = 0.5
    norm_ratio: float = 3.0

    def __post_init__(self) -> None:
        if not self.error > 0:
            raise ValueError(f"Threshold(error={self.error}): must be > 0")
        if not -1 <= self.cosine <= 1:
            raise ValueError(f"Threshold(cosine={self.cosine}): must be in [-1, 1]")
        if not self.norm_ratio >= 1:
            raise ValueError(f"Threshold(norm_ratio={self.norm_ratio}): must be >= 1")

    def past(self, figures: LayerFigures) -> list[str]:
        """What of a layer's figures is past the threshold, in words; NaN is."""
        wrong = [
            f"{state} error {error:.3g} (at most {self.error:g})"
            for state, error in figures.errors.items()
            if not error <= self.error
        ]
        if figures.cosine is not None and not figures.cosine >= self.cosine:
            wrong.append(f"update cosine {figures.cosine:.3g} (at least {self.cosine:g})")
        ratio = figures.norm_ratio
        if ratio is not None and not 1 / self.norm_ratio <= ratio <= self.norm_ratio:
            wrong.append(f"update norm ratio {ratio:.3g} ({1 / self.norm_ratio:.3g} to {self.norm_ratio:g})")
        return wrong


class StateDrift(RuntimeError):
    """Compressed states of some layers are too far from exact ones; the message names layers and figures."""
