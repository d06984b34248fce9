"""The live object: an optimizer with compressed states, made from the user's, stepped, saved and restored."""

from lightning_sketch.optimizer.compression import Compression, _no_model

__all__ = ["Compression", "_no_model"]  # where pickles of version 0.1 look for it
