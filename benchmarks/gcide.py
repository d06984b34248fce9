"""GCIDE, the dictionary's English text, as token ids.

The text comes from Debian's ``dict-gcide`` (GPL-2+): downloaded with ``apt-get download``,
unpacked beside nothing else with ``dpkg -x`` and tokenised once into a cache folder
(``$LIGHTNING_SKETCH_CACHE``, else ``~/.cache/lightning_sketch``). Nothing is installed.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PACKAGE = "dict-gcide"
DICTIONARY = "usr/share/dictd/gcide.dict.dz"
# Repeated after nearly every entry: left in, it would be the easiest word of the set.
SOURCE_MARK = "[1913 Webster]"
TOKEN = re.compile(r"[a-z']+|[^a-z'\s]")
BLOCK = 2_000  # tokens; the dictionary is alphabetical, so blocks are shuffled before the split
UNKNOWN = 0  # id of <unk>
SPLIT_SEED = 20_260_101
VALID_SHARE = TEST_SHARE = 0.05

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """Token ids in shuffled blocks; ``[blocks, 2000]`` each, id 0 is ``<unk>``."""

    train: Ids
    valid: Ids
    test: Ids
    vocabulary: int  # number of ids, <unk> included
    counts: npt.NDArray[np.int64]  # [vocabulary], occurrences in the training blocks


def load(*, min_count: int = 2, max_words: int | None = None) -> Corpus:
    """The corpus with the words seen at least ``min_count`` times, or the ``max_words`` commonest.

    Ids are in order of frequency over the whole text: 1 is the commonest word.

    >>> load().vocabulary  # doctest: +SKIP
    109213
    """
    ids, frequencies = _tokens(cache_folder())
    # ids are frequency ranks starting at 1, so a vocabulary is a cut through them.
    kept = int((frequencies >= min_count).sum())
    if max_words is not None:
        kept = min(kept, max_words)
    ids = np.where(ids > kept, UNKNOWN, ids).astype(np.int32)

    blocks = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(blocks))
    valid, test = int(VALID_SHARE * len(blocks)), int(TEST_SHARE * len(blocks))
    train = blocks[order[valid + test :]]
    return Corpus(
        train=train,
        valid=blocks[order[:valid]],
        test=blocks[order[valid : valid + test]],
        vocabulary=kept + 1,
        counts=np.bincount(train.reshape(-1), minlength=kept + 1),
    )


def cache_folder() -> Path:
    """Where the text is kept between runs."""
    chosen = os.environ.get("LIGHTNING_SKETCH_CACHE")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "lightning_sketch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tokens(folder: Path) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Frequency ranks of all tokens ``[tokens]`` and how often each rank occurs ``[distinct]``."""
    path = folder / "gcide.npz"
    if not path.exists():
        ids, frequencies = _tokenise(text(folder))
        save(path, ids=ids, frequencies=frequencies)
    with np.load(path) as stored:
        return stored["ids"], stored["frequencies"]


def _tokenise(text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
    tokens = TOKEN.findall(text.replace(SOURCE_MARK, " ").lower())
    # Ties in frequency are broken by spelling, so that ids do not depend on dictionary order.
    ranked = sorted(Counter(tokens).items(), key=lambda item: (-item[1], item[0]))
    rank = {word: i for i, (word, _) in enumerate(ranked, start=1)}
    ids = np.fromiter((rank[token] for token in tokens), dtype=np.int32, count=len(tokens))
    return ids, np.array([count for _, count in ranked], dtype=np.int64)


def save(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Arrays into an ``.npz`` file, which is there at once and whole: two processes may build it at the same time."""
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def text(folder: Path) -> str:
    """The dictionary, downloaded into `folder`."""
    with unpacked(PACKAGE, folder) as files:
        return gzip.decompress((files / DICTIONARY).read_bytes()).decode("utf-8", "replace")


@contextlib.contextmanager
def unpacked(package: str, folder: Path) -> Iterator[Path]:
    """The files of a Debian package, downloaded into `folder` and gone afterwards; nothing is installed."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        (archive,) = Path(work).glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(archive), work], check=True)
        yield Path(work)


if __name__ == "__main__":
    corpus = load()
    print(f"{corpus.vocabulary:,} ids; blocks: {len(corpus.train)} / {len(corpus.valid)} / {len(corpus.test)}")
