"""Checkpoints that move: read from any engine and world size, restored into any other."""

from lightning_sketch.checkpoints.contents import SavedLayer, SavedOptimizer
from lightning_sketch.checkpoints.open import read_checkpoint
from lightning_sketch.checkpoints.restore import restore

__all__ = ["SavedLayer", "SavedOptimizer", "read_checkpoint", "restore"]
