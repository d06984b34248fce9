"""Open checkpoint files that may be damaged or hostile: nothing is run, and nothing that was altered is taken."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load_file(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """``torch.load`` on the CPU with ``weights_only=True``, memory-mapped, checksums verified.

    Args:
        path: of ``torch.save``.
        allowed: classes that may be in it beside tensors and primitives.

    Raises:
        ValueError: it is truncated, altered, no such file, or holds other objects.
    """
    _verify(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path.name} cannot be read with weights_only=True: {str(error).splitlines()[0]}") from error


def check_metadata(path: Path) -> None:
    """Refuse the ``.metadata`` of a torch.distributed.checkpoint, which torch unpickles, if it names foreign objects.

    Raises:
        ValueError: it does, or is damaged.
    """
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path.name} cannot be trusted: {error}") from error


def _verify(path: Path) -> None:
    # torch checks no checksums of memory-mapped files.
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path.name} cannot be read: it is truncated or no file of torch.save ({error})") from error
    if bad is not None:
        raise ValueError(f"{path.name} cannot be read: {bad} in it was altered (its checksum is wrong)")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if _expected(module, name) else None
        if found is None or (module == "torch" and not isinstance(found, torch.dtype) and found is not torch.Size):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return found


# Plain data classes. Not the whole modules: they hold functions that load files.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}  # fmt: skip


def _expected(module: str, name: str) -> bool:
    return (
        name in _CLASSES.get(module, ())
        or module == "torch"
        or (module, name) == ("torch.serialization", "_get_layout")
        or (module == "pathlib" and name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath"))
        or (module, name) == ("collections", "OrderedDict")
    )
