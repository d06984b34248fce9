"""How well compressed states do, measured in training on a sample of rows, and what to do where they drift."""

from lightning_sketch.monitor.drift import StateDrift, Threshold
from lightning_sketch.monitor.figures import LayerFigures
from lightning_sketch.monitor.monitor import Monitor

__all__ = ["LayerFigures", "Monitor", "StateDrift", "Threshold"]
