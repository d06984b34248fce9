"""See the package."""

from lightning_sketch.optimizer.stock import _new

__all__ = ["_new"]
