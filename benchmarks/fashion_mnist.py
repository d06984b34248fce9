"""Fashion-MNIST: 60,000 and 10,000 pictures of clothes, 28 x 28, in ten classes.

From Debian's ``dataset-fashion-mnist`` (MIT), downloaded with ``apt-get download`` and unpacked with ``dpkg -x`` into
the cache folder of :mod:`benchmarks.gcide`. Nothing is installed.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gcide import cache_folder, save, unpacked

PACKAGE = "dataset-fashion-mnist"
FOLDER = "usr/share/datasets/fashion-mnist"
SIZE = 28
VALID = 5_000  # of the training pictures, drawn at random
SPLIT_SEED = 20_260_101


@dataclass(frozen=True)
class Pictures:
    """Pictures ``[count, 1, 28, 28]``, of mean 0 and deviation 1 over the training set, and classes ``[count]``."""

    pictures: Tensor
    classes: Tensor


def load() -> tuple[Pictures, Pictures, Pictures]:
    """Training (55,000), validation (5,000) and test pictures (10,000)."""
    path = cache_folder() / "fashion_mnist.npz"
    if not path.exists():
        save(path, **_download(cache_folder()))
    with np.load(path) as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(arrays["train"])))
    pictures, classes = arrays["train"][order], arrays["train_classes"][order].long()
    scale = pictures[VALID:].float()
    mean, deviation = float(scale.mean()), float(scale.std())

    def made(raw: Tensor, of: Tensor) -> Pictures:
        return Pictures(raw.float().sub_(mean).div_(deviation).unsqueeze(1), of)

    return (
        made(pictures[VALID:], classes[VALID:]),
        made(pictures[:VALID], classes[:VALID]),
        made(arrays["test"], arrays["test_classes"].long()),
    )


def _download(folder: Path) -> dict[str, np.ndarray]:
    with unpacked(PACKAGE, folder) as files:
        found = files / FOLDER
        return {
            "train": _read(found / "train-images-idx3-ubyte.gz", 16).reshape(-1, SIZE, SIZE),
            "train_classes": _read(found / "train-labels-idx1-ubyte.gz", 8),
            "test": _read(found / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, SIZE, SIZE),
            "test_classes": _read(found / "t10k-labels-idx1-ubyte.gz", 8),
        }


def _read(path: Path, header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header).copy()


if __name__ == "__main__":
    print([len(part.classes) for part in load()])
