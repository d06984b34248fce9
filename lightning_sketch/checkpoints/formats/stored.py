"""Tensors of a torch.distributed.checkpoint that stay in their files: what is asked for is read when it is asked for.

torch's own reader loads a whole chunk, as one rank saved it, even for a single row of it.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_sketch.checkpoints.integrity import Piece, Window, opened
from lightning_sketch.layers.reshard import LazyTensor
from lightning_sketch.sharding.base import BLOCK_NUMEL

#: Start and length along every dimension.
Region = tuple[tuple[int, int], ...]

_LOCAL_HEADER = 30  # bytes of a zip record's header before its name; lengths of name and extra field end it


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor as one rank saved it: an archive of torch.save that holds one tensor.

    Args:
        piece: where the archive is.
        region: which part of the tensor.
    """

    piece: Piece
    region: Region

    @cached_property
    def _rows(self) -> tuple[int, torch.dtype] | Tensor:
        """Where in the file the first row is, and the dtype; or the tensor, if it was transposed when it was saved.

        Raises:
            ValueError: it is not the tensor that the checkpoint's metadata describe.
        """
        with opened(self.piece.path, self.piece.offset, self.piece.length) as (window, archive):
            tensor = self._load(window, "meta")
            if not tensor.is_contiguous():
                return self._load(window, "cpu")
            data = [info for info in archive.infolist() if "/data/" in info.filename]
            order = [archive.read(info).decode() for info in archive.infolist() if info.filename.endswith("/byteorder")]
            if order not in ([], [sys.byteorder]):
                return self._load(window, "cpu")
            end = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
            if len(data) != 1 or data[0].compress_type != zipfile.ZIP_STORED or data[0].file_size < end:
                raise self._unreadable("it does not hold the elements that it says")
            window.seek(data[0].header_offset + _LOCAL_HEADER - 4)
            header = _LOCAL_HEADER + sum(struct.unpack("<HH", window.read(4)))
            first = self.piece.offset + data[0].header_offset + header
            return first + tensor.storage_offset() * tensor.itemsize, tensor.dtype

    def _load(self, window: Window | io.BytesIO, device: str) -> Tensor:
        shape = tuple(length for _, length in self.region)
        window.seek(0)
        try:
            tensor = torch.load(window, map_location=device, weights_only=True)  # type: ignore[arg-type]
        except Exception as error:  # torch raises many kinds
            raise self._unreadable(str(error).splitlines()[0]) from error
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            raise self._unreadable(f"it holds something else than a tensor of shape {list(shape)}")
        return tensor

    def _unreadable(self, why: str) -> ValueError:
        return ValueError(f"a tensor in {self.piece.path.name} cannot be read: {why}")

    def rows(self, start: int, count: int) -> Tensor:
        """Some rows of the chunk."""
        if isinstance(self._rows, Tensor):
            return self._rows.narrow(0, start, count)
        first, dtype = self._rows
        shape = (count, *(length for _, length in self.region[1:]))
        row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
        buffer = bytearray(row_bytes * count)
        with self.piece.path.open("rb") as file:
            file.seek(first + start * row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise self._unreadable("the file is truncated")
        return torch.frombuffer(buffer, dtype=dtype).view(shape)


@dataclass(frozen=True)
class LazyFileTensor(LazyTensor):
    """A tensor, or a part of one, in a checkpoint's files. Indexes and narrows like a tensor, without reading.

    Args:
        chunks: of the whole tensor.
        region: the part that this is.
        dtype: as the checkpoint's metadata have it.
        indexed: how many of the first dimensions were indexed away.
    """

    chunks: Sequence[Chunk]
    region: Region
    dtype: torch.dtype
    indexed: int = 0

    @property
    def shape(self) -> torch.Size:
        return torch.Size(length for _, length in self.region[self.indexed :])

    def narrow(self, dim: int, start: int, length: int) -> LazyFileTensor:
        """``tensor.narrow``."""
        dim += self.indexed
        begin, size = self.region[dim]
        if not 0 <= start <= start + length <= size:
            raise IndexError(f"[{start}, {start + length}) is out of range for a dimension of {size}")
        return replace(self, region=(*self.region[:dim], (begin + start, length), *self.region[dim + 1 :]))

    def __getitem__(self, index: int) -> LazyFileTensor:
        """``tensor[index]``."""
        return replace(self.narrow(0, index, 1), indexed=self.indexed + 1)

    def read(self, device: torch.device | None = None) -> Tensor:
        """All of it. Beside what is returned, no more than some rows are in memory.

        Raises:
            ValueError: the files do not hold it.
        """
        whole = torch.empty([length for _, length in self.region], dtype=self.dtype, device=device)
        found = 0
        for chunk in self.chunks:
            common = list(_common(chunk.region, self.region))
            if len(common) < len(self.region):
                continue
            (start, stop), *others = common
            row_numel = max(1, torch.Size(length for _, length in chunk.region[1:]).numel())
            step = max(1, BLOCK_NUMEL // row_numel)
            for row in range(start, stop, step):
                count = min(step, stop - row)
                values = chunk.rows(row - chunk.region[0][0], count)
                target = whole.narrow(0, row - self.region[0][0], count)
                for dim, (begin, end) in enumerate(others, start=1):
                    values = values.narrow(dim, begin - chunk.region[dim][0], end - begin)
                    target = target.narrow(dim, begin - self.region[dim][0], end - begin)
                target.copy_(values)
                found += values.numel()
        if found != whole.numel():
            raise ValueError(f"the checkpoint holds {found} of {whole.numel()} elements of a tensor")
        return whole.view(self.shape)


def _common(a: Region, b: Region) -> Iterator[tuple[int, int]]:
    """Start and stop along every dimension in which both have elements in common."""
    for (first, length), (other, size) in zip(a, b, strict=True):
        start, stop = max(first, other), min(first + length, other + size)
        if start < stop:
            yield start, stop
