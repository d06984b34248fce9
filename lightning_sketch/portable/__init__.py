"""Checkpoints that move: read from any engine and world size, restored into any other."""

from lightning_sketch.portable.read import read_checkpoint
from lightning_sketch.portable.restore import restore
from lightning_sketch.portable.saved import SavedLayer, SavedOptimizer

__all__ = ["SavedLayer", "SavedOptimizer", "read_checkpoint", "restore"]
