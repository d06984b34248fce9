"""Tokens of 16 bits in a file, for :mod:`benchmarks.gpu_train`: of text that is on disk, or made.

python -m benchmarks.gpu_tokens runs/tokens.bin --text /usr/share/doc     # files of a folder, or one file
python -m benchmarks.gpu_tokens runs/tokens.bin --count 20000000          # made: frequencies as Zipf's law says
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

#: Of GPT-2, padded to a multiple of 128.
VOCABULARY = 50_304
#: Tokens that stand for a byte each: of what the vocabulary lacks.
BYTES = 256
#: Of made text: how often a token follows from the one before it, and does not come by its frequency.
FOLLOWS = 0.6
_PIECES = re.compile(rb" ?\w+| ?[^\s\w]+|\s+")
_MOST_BYTES = 1 << 28


def of_text(path: Path) -> Tensor:
    """Tokens of a file, or of all in a folder, uint16 ``[n]``: the most frequent words, and bytes of others."""
    counts: Counter[bytes] = Counter()
    for text in _texts(path):
        counts.update(_PIECES.findall(text))
    ids = {piece: BYTES + i for i, (piece, _) in enumerate(counts.most_common(VOCABULARY - BYTES))}
    found: list[int] = []
    for text in _texts(path):
        for piece in _PIECES.findall(text):
            known = ids.get(piece)
            found += piece if known is None else (known,)
    if not found:
        raise SystemExit(f"there is no text in {path}")
    return torch.tensor(found, dtype=torch.int32).to(torch.uint16)


def made(count: int, seed: int = 0) -> Tensor:
    """Tokens with Zipf's frequencies, each of which often says what follows it: uint16 ``[count]``."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    edges = weights.cumsum(0) / weights.sum()
    drawn = torch.searchsorted(edges, torch.rand(count, generator=generator, dtype=torch.float64)).clamp_(
        max=VOCABULARY - 1
    )
    following = drawn[torch.randint(count, (VOCABULARY,), generator=generator)]  # frequent ones follow often
    follows = torch.rand(count, generator=generator) < FOLLOWS
    follows[1::2] = False  # so that what is followed is known, and all can be made at once
    after = following[drawn.roll(1)]
    return drawn.where(~follows, after).to(torch.int32).to(torch.uint16)


def write(path: Path, tokens: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokens.view(torch.int16).numpy().tobytes())


def read(path: Path) -> Tensor:
    """Tokens of a file, uint16 ``[n]``; read when they are asked for."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size // 2, dtype=torch.int16).view(torch.uint16)


def _texts(path: Path) -> Iterator[bytes]:
    read_bytes = 0
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if read_bytes < _MOST_BYTES and file.is_file() and not file.is_symlink():
            text = file.read_bytes()
            if b"\0" not in text[:4096]:  # else no text
                read_bytes += len(text)
                yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, help="a file or a folder; default: tokens are made")
    parser.add_argument("--count", type=int, default=20_000_000, help="tokens to make")
    arguments = parser.parse_args()
    tokens = made(arguments.count) if arguments.text is None else of_text(arguments.text)
    write(arguments.out, tokens)
    print(f"{arguments.out}: {len(tokens):,} tokens, {len(tokens.to(torch.int32).unique()):,} different ones")


if __name__ == "__main__":
    main()
