"""The text of the demo: PyTorch's own Python source, read where pip put it.

Nothing is downloaded. The tokens (identifiers, numbers, single symbols) are cached as one array,
so only the first run reads the source. Files, not lines, are held out for validation: a line's
neighbours would give it away.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|[^\s\w]")
UNKNOWN, END_OF_FILE = 0, 1  # the first two rows of both tables
MIN_COUNT = 2  # a token seen once in the training files becomes UNKNOWN
HELD_OUT_ONE_IN = 20  # files
FORMAT = 1  # part of the cache's name: raise it when the meaning of the arrays changes

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """Token ids, the most frequent token first. ``counts`` are of the training tokens."""

    train: IntArray  # [tokens]
    validation: IntArray  # [tokens]
    counts: npt.NDArray[np.int64]  # [vocabulary]
    files: int
    version: str

    @property
    def vocabulary(self) -> int:
        return len(self.counts)


def load(cache: Path) -> Corpus:
    """The corpus of the installed PyTorch, from the cache if it is there."""
    version = importlib.metadata.version("torch")
    folder = cache / f"torch-{version}-v{FORMAT}"
    if not (folder / "about.json").exists():
        _build(folder)
    about = json.loads((folder / "about.json").read_text())
    # Mapped, not read: the trainings touch the pages they need.
    train, validation, counts = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation", "counts")
    )
    return Corpus(train, validation, counts, about["files"], version)


def source_files() -> list[tuple[str, Path]]:
    """(name relative to the package, path) of every Python file of the installed PyTorch, sorted."""
    spec = importlib.util.find_spec("torch")  # finds it without the seconds that importing takes
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("The demo reads PyTorch's source, and PyTorch is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    return sorted((p.relative_to(root).as_posix(), p) for p in root.rglob("*.py"))


def is_held_out(name: str) -> bool:
    """The same files on every machine, and a file stays on its side when others come or go."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def _build(folder: Path) -> None:
    seen: dict[str, int] = {}  # token -> order of first appearance, 0 and 1 being taken
    parts: dict[bool, list[IntArray]] = {False: [], True: []}
    files = source_files()
    for name, path in files:
        tokens = TOKEN.findall(path.read_text(encoding="utf-8", errors="ignore"))
        ids = [seen.setdefault(token, len(seen) + 2) for token in tokens]
        parts[is_held_out(name)].append(np.array([*ids, END_OF_FILE], dtype=np.int32))
    train, validation = np.concatenate(parts[False]), np.concatenate(parts[True])

    counts = np.bincount(train, minlength=len(seen) + 2)
    counts[:2] = 0
    by_frequency = np.argsort(-counts, kind="stable")
    kept = by_frequency[counts[by_frequency] >= MIN_COUNT]
    new_id = np.full(len(seen) + 2, UNKNOWN, dtype=np.int32)
    new_id[END_OF_FILE] = END_OF_FILE
    new_id[kept] = np.arange(2, len(kept) + 2)

    train, validation = new_id[train], new_id[validation]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.npy", train)
    np.save(folder / "validation.npy", validation)
    np.save(folder / "counts.npy", np.bincount(train, minlength=len(kept) + 2))
    # Written last: its presence says that the arrays are whole.
    (folder / "about.json").write_text(json.dumps({"files": len(files)}))
