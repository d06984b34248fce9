"""Checksums of checkpoint files: what torch.save wrote is a zip archive, and every record in it has a CRC-32.

torch does not verify them when it loads: a flipped bit in a tensor is just another number. Small records are verified
by whoever opens a file; for the large ones, which cost a pass over the checkpoint, ranks share the work.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

#: Bytes from which on a piece is verified by one rank for all.
LARGE = 1 << 16

_READ_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True, order=True)
class Piece:
    """A part of a checkpoint that is verified by itself.

    Args:
        path: the file.
        offset: first byte of an archive in it.
        length: bytes of the archive.
        record: the record of the archive, or ``""`` for all of its records.
        size: bytes to be read.
    """

    path: Path
    offset: int
    length: int
    record: str
    size: int


class Window(io.RawIOBase):
    """The bytes ``[offset, offset + length)`` of a file, as a file."""

    def __init__(self, file: io.BufferedIOBase, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, origin + position)
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = memoryview(buffer)[: max(0, self.length - self.position)]
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(wanted)
        self.position += count
        return count


@contextmanager
def opened(
    path: Path, offset: int = 0, length: int | None = None
) -> Iterator[tuple[Window | io.BytesIO, zipfile.ZipFile]]:
    """An archive of torch.save, alone in a file or at a place in one; a small one is read at once.

    Raises:
        ValueError: on entering and inside: it is missing, truncated, altered, or no such archive.
    """
    try:
        with path.open("rb") as file:
            length = path.stat().st_size if length is None else length
            window: Window | io.BytesIO = Window(file, offset, length)
            if offset >= 0 and 0 <= length < LARGE:  # there are thousands, and zipfile reads each in dozens of pieces
                file.seek(offset)
                window = io.BytesIO(file.read(length))
            with zipfile.ZipFile(window) as archive:
                yield window, archive
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: it is truncated or no file of torch.save ({error})") from error


def pieces_of_file(path: Path) -> list[Piece]:
    """The records of a file of torch.save; see `opened` for what it raises."""
    length = path.stat().st_size
    with opened(path) as (_, archive):
        return [Piece(path, 0, length, info.filename, info.file_size) for info in archive.infolist()]


def verify(pieces: Iterable[Piece]) -> None:
    """Read pieces and compare their checksums.

    Raises:
        ValueError: one is wrong; the message names file and record.
    """
    for place, group in groupby(sorted(pieces), key=lambda piece: (piece.path, piece.offset, piece.length)):
        with opened(*place) as (_, archive):
            for piece in group:
                for record in [piece.record] if piece.record else archive.namelist():
                    _verify(archive, record, piece.path)


def _verify(archive: zipfile.ZipFile, record: str, path: Path) -> None:
    try:
        if archive.getinfo(record).compress_type != zipfile.ZIP_STORED:  # torch does not compress
            raise zipfile.BadZipFile(record)
        with archive.open(record) as content:
            while content.read(_READ_AT_ONCE):
                pass
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:  # RuntimeError: said to be encrypted
        raise ValueError(f"{path.name} cannot be read: {record} in it was altered (its checksum is wrong)") from error


def large(pieces: Iterable[Piece]) -> list[Piece]:
    """Those that are not verified by everyone."""
    return [piece for piece in pieces if piece.size >= LARGE]


def small(pieces: Iterable[Piece]) -> list[Piece]:
    """Those that are."""
    return [piece for piece in pieces if piece.size < LARGE]


def share(pieces: Iterable[Piece], index: int, parts: int) -> list[Piece]:
    """Part `index` of `parts` of about equal numbers of bytes, the same on every rank that knows the same pieces."""
    loads, mine = [0] * parts, []
    for piece in sorted(pieces, key=lambda piece: (-piece.size, piece)):
        lightest = loads.index(min(loads))
        loads[lightest] += piece.size
        if lightest == index:
            mine.append(piece)
    return mine


def fingerprint(pieces: Sequence[Piece]) -> list[tuple[str, int, int, int]]:
    """What tells the files of a checkpoint from others, copies on other disks included: primitives."""
    stats = [(str(path), path.stat()) for path in sorted({piece.path for piece in pieces})]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
