"""Where pickles of version 0.1 look for the converted optimizers."""

from lightning_sketch.optimizer.classes import COMPRESSED

globals().update({cls.__qualname__: cls for cls in COMPRESSED.values()})
