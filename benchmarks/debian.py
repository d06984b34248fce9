"""Debian's packages: what a description says -> the packages that are depended on. Extreme multi-label classification.

The text is apt's own index of Debian 12 for amd64 with its English descriptions, fetched by ``apt-get update`` into the
cache folder (``$LIGHTNING_SKETCH_CACHE``, else ``~/.cache/lightning_sketch``) from where the system's apt has Debian 12
from. Nothing of the system's apt is changed, and nothing is installed. Needs the package ``debian-archive-keyring``.

    python -m benchmarks.debian
"""

from __future__ import annotations

import re
import subprocess
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.gcide import cache_folder, save

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RELEASE = "bookworm"
WORD = re.compile(r"[a-z][a-z0-9+-]*")
DEPENDENCY = re.compile(r"[a-z0-9][a-z0-9+.-]*")  # without version, architecture and alternatives
BUCKETS = 2**15  # that words are hashed to
LEAST_SOURCES = 2  # whose packages have a label: a library that its own source alone depends on cannot be learnt
MOST_DOCUMENTS = 0.05  # that have a label: libc6 and its like say nothing
SPLIT_SEED = 20_260_101
VALID_SHARE = TEST_SHARE = 0.1  # of the sources

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """A list of ids for each document: those of document ``i`` are ``ids[starts[i] : starts[i + 1]]``."""

    ids: Ids
    starts: Ids  # [documents + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, documents: Ids) -> Ragged:
        """The lists of some documents, in their order."""
        return Ragged.of([self.ids[self.starts[i] : self.starts[i + 1]] for i in documents])

    @staticmethod
    def of(lists: Iterable[npt.ArrayLike]) -> Ragged:
        arrays = [np.asarray(one, dtype=np.int64) for one in lists]
        starts = np.cumsum([0, *(len(one) for one in arrays)])
        return Ragged(np.concatenate(arrays), starts)


@dataclass(frozen=True)
class Part:
    """Some of the documents."""

    words: Ragged  # of distinct hashed words
    labels: Ragged  # of distinct labels, at least one


@dataclass(frozen=True)
class Packages:
    """All documents, divided by source package: what is built from one source has nearly the same text."""

    train: Part
    valid: Part
    test: Part
    labels: int


def load() -> Packages:
    """All documents; fetched and tokenised once."""
    path = cache_folder() / "debian.npz"
    if not path.exists():
        words, labels, parts = _read(cache_folder() / "apt")
        save(path, words=words.ids, of_words=words.starts, labels=labels.ids, of_labels=labels.starts, parts=parts)
    with np.load(path) as stored:
        words, labels = (Ragged(stored[name], stored[f"of_{name}"]) for name in ("words", "labels"))
        parts = stored["parts"]
    places = [np.flatnonzero(parts == i) for i in range(3)]
    train, valid, test = (Part(words.take(documents), labels.take(documents)) for documents in places)
    return Packages(train, valid, test, int(labels.ids.max()) + 1)


def _read(folder: Path) -> tuple[Ragged, Ragged, Ids]:
    """Words, labels and which part (0: train, 1: valid, 2: test) of all documents."""
    index, descriptions = _fetch(folder)
    text = {(one["Package"], one["Description-md5"]): one["Description-en"] for one in _stanzas(descriptions)}
    documents: list[tuple[str, list[int], set[str]]] = []  # source, words, depends on
    for one in _stanzas(index):
        description = text.get((one["Package"], one.get("Description-md5", "")), one.get("Description", ""))
        words = sorted({zlib.crc32(word.encode()) % BUCKETS for word in WORD.findall(description.lower())})
        source = one.get("Source", one["Package"]).split()[0]
        documents.append((source, words, _dependencies(one)))

    sources_of: dict[str, set[str]] = defaultdict(set)
    times: Counter[str] = Counter()
    for source, _, names in documents:
        times.update(names)
        for name in names:
            sources_of[name].add(source)
    most = MOST_DOCUMENTS * len(documents)
    kept = sorted(name for name in times if len(sources_of[name]) >= LEAST_SOURCES and times[name] <= most)
    number = {name: i for i, name in enumerate(kept)}
    chosen = [
        (source, words, sorted(number[name] for name in names if name in number)) for source, words, names in documents
    ]
    chosen = [(source, words, labels) for source, words, labels in chosen if words and labels]
    part = _parts({source for source, _, _ in chosen})
    return (
        Ragged.of(words for _, words, _ in chosen),
        Ragged.of(labels for _, _, labels in chosen),
        np.array([part[source] for source, _, _ in chosen]),
    )


def _parts(sources: set[str]) -> dict[str, int]:
    """Which part each source is in."""
    names = sorted(sources)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    valid, test = int(VALID_SHARE * len(names)), int(TEST_SHARE * len(names))
    return {names[j]: 1 if i < valid else 2 if i < valid + test else 0 for i, j in enumerate(order)}


def _dependencies(stanza: dict[str, str]) -> set[str]:
    """Of alternatives the first."""
    fields = [stanza[key] for key in ("Pre-Depends", "Depends") if key in stanza]
    matches = [DEPENDENCY.match(one.strip()) for one in ",".join(fields).split(",")]
    return {match[0] for match in matches if match}


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """The entries of a control file."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line.startswith(" "):
                fields[key] += "\n" + line[1:]
            else:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if "Package" in fields:
            yield fields


def _fetch(folder: Path) -> tuple[str, str]:
    """The index of packages, and the file of their descriptions."""
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    source = folder / "sources.list"
    source.write_text(f"deb [arch=amd64 signed-by={KEYRING}] {_mirror()} {RELEASE} main\n")
    settings = {
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder,
        "Dir::Etc::SourceList": source,
        "Dir::Etc::SourceParts": "-",
        "Acquire::Languages": "en",
        "APT::Sandbox::User": "",  # files are the caller's
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    subprocess.run(["apt-get", *options, "update"], check=True)
    listed = subprocess.run(
        ["apt-get", *options, "indextargets", "--format", "$(CREATED_BY) $(FILENAME)"],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    files = dict(line.split(maxsplit=1) for line in listed.splitlines())
    read = ["/usr/lib/apt/apt-helper", *options, "cat-file"]
    index, descriptions = (
        subprocess.run([*read, files[name]], check=True, stdout=subprocess.PIPE).stdout.decode()
        for name in ("Packages", "Translations")
    )
    return index, descriptions


def _mirror() -> str:
    """Where the system's apt has the release from.

    Raises:
        RuntimeError: nowhere.
    """
    sources = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    main_of_release = [f"Release: {RELEASE}", "Component: main"]
    found = subprocess.run([*sources, *main_of_release], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    if not found:
        raise RuntimeError(f"apt has no source of Debian's {RELEASE} main: add one to /etc/apt/sources.list.d")
    return found[0]


if __name__ == "__main__":
    packages = load()
    for name in ("train", "valid", "test"):
        part: Part = getattr(packages, name)
        words, labels = len(part.words.ids) / len(part.words), len(part.labels.ids) / len(part.labels)
        print(f"{name}: {len(part.words):,} documents, {words:.1f} words and {labels:.2f} labels each")
    print(f"{packages.labels:,} labels")
