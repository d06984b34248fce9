"""Open checkpoint files that may be damaged or hostile: nothing is run, and nothing that was altered is taken."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_sketch.checkpoints.integrity import Piece, pieces_of_file, small, verify


def load_file(path: Path, allowed: Sequence[Any] = ()) -> tuple[Any, list[Piece]]:
    """``torch.load`` on the CPU with ``weights_only=True``, memory-mapped: of tensors, only what is touched is read.

    Args:
        path: of ``torch.save``.
        allowed: classes that may be in it beside tensors and primitives.

    Returns:
        its contents, and its pieces, of which the small ones were verified.

    Raises:
        ValueError: it is truncated, altered, no such file, or holds other objects.
    """
    pieces = pieces_of_file(path)
    verify(small(pieces))
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), pieces
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
