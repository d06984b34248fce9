"""Read the optimizer states of a torch.distributed.checkpoint directory, layer by layer, on one process."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_sketch.layer import RECORDS, Layer
from lightning_sketch.portable.safe import check_metadata
from lightning_sketch.portable.saved import SavedLayer, SavedOptimizer, from_entry
from lightning_sketch.reshard import Source

Path_ = tuple[Any, ...]


def is_dcp(directory: Path) -> bool:
    """Whether `directory` is a torch.distributed.checkpoint."""
    return (directory / ".metadata").is_file()


def read_dcp(directory: Path, number: int = 0) -> SavedOptimizer:
    """Read a checkpoint that holds a state dict of ``torch.distributed.checkpoint.state_dict``, at any depth.

    Tensors are read when a layer's states are asked for, one layer at a time.

    Args:
        number: which optimizer, where there are several named ``optimizer_0``, ``optimizer_1`` ..., as Lightning does.

    Raises:
        ValueError: it holds no optimizer, or more than one.
    """
    stored = _Directory(directory)
    root = stored.root(number)
    entries: dict[str, dict[str, str]] = {}
    for path, key in stored.paths.items():
        if path[: len(root) + 1] == (*root, "state") and len(path) == len(root) + 3:
            entries.setdefault(path[-2], {})[path[-1]] = key
    groups = _groups(stored, root)
    decided = {
        layer.fqn: layer for group in groups for record in group.pop(RECORDS, ()) if record
        for layer in [Layer.from_record(record)]
    }  # fmt: skip
    steps = stored.load([keys["step"] for keys in entries.values() if "step" in keys])
    layers = {
        fqn: _layer(stored, fqn, keys, decided.get(fqn), steps.get(keys.get("step", "")))
        for fqn, keys in entries.items()
    }
    return SavedOptimizer(layers, groups)


def write_dcp(source: Path, destination: Path, state_dict: Mapping[str, Any]) -> None:
    """Copy a checkpoint, with another state dict in place of its optimizer's. Holds all of it in memory.

    Args:
        state_dict: of the optimizer, keyed by name.
    """
    stored = _Directory(source)
    if len(stored.roots()) > 1:
        raise ValueError(f"it holds {len(stored.roots())} optimizers; only directories with one can be converted")
    root = stored.root()
    others = {
        path: key for path, key in stored.paths.items() if path[: len(root)] != root or path[len(root)] not in _OWN
    }
    loaded = stored.load(list(others.values()))
    copy: dict[str, Any] = {}
    for path, key in others.items():
        set_element(copy, path, loaded[key])
    for part in _OWN:
        for path, value in _leaves(state_dict[part], (*root, part)):
            set_element(copy, path, value)
    partial = destination.with_name(destination.name + ".partial")
    save(copy, storage_writer=FileSystemWriter(partial), no_dist=True)
    partial.replace(destination)


_OWN = ("state", "param_groups")


def _leaves(value: Any, path: Path_) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


def _layer(stored: _Directory, fqn: str, keys: Mapping[str, str], layer: Layer | None, step: Any) -> SavedLayer:
    def states() -> dict[str, list[Source]]:
        loaded = stored.load(list(keys.values()))
        return from_entry(fqn, {name: loaded[key] for name, key in keys.items()}, layer).states()

    if layer is not None:
        shape = layer.shape
    else:
        items = (stored.metadata.state_dict_metadata[key] for name, key in keys.items() if name != "step")
        shape = next((tuple(item.size) for item in items if isinstance(item, TensorStorageMetadata)), ())
    return SavedLayer(fqn, shape, None if step is None else float(step), layer, states)


def _groups(stored: _Directory, root: Path_) -> list[dict[str, Any]]:
    """The groups' options; lists and tuples come back as lists."""
    inside = {
        path[len(root) + 1 :]: key
        for path, key in stored.paths.items()
        if path[: len(root) + 1] == (*root, "param_groups")
    }
    loaded = stored.load(list(inside.values()))
    groups: dict[int, dict[str, Any]] = {}
    for (number, option, *rest), key in inside.items():
        group = groups.setdefault(number, {})
        if rest:  # a list, item by item
            items = group.setdefault(option, {})
            items[rest[0]] = loaded[key]
        else:
            group[option] = loaded[key]
    for group in groups.values():
        for option, value in group.items():
            if isinstance(value, dict) and value and all(isinstance(index, int) for index in value):
                group[option] = [value[index] for index in sorted(value)]
    return [groups[number] for number in sorted(groups)]


class _Directory:
    """A checkpoint's directory; its metadata are checked and read once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        check_metadata(directory / ".metadata")
        self.metadata: Metadata = FileSystemReader(directory).read_metadata()
        self.paths: dict[Path_, str] = {tuple(path): key for key, path in (self.metadata.planner_data or {}).items()}

    def roots(self) -> set[Path_]:
        """Where in the checkpoint optimizers' state dicts are."""
        return {path[: path.index("param_groups")] for path in self.paths if "param_groups" in path}

    def root(self, number: int = 0) -> Path_:
        """Where the one optimizer's state dict is, or that of optimizer `number`."""
        roots = self.roots()
        if len(roots) > 1 and all(root and re.fullmatch(r"optimizer_\d+", str(root[-1])) for root in roots):
            roots = {root for root in roots if root[-1] == f"optimizer_{number}"}
        if len(roots) != 1:
            where = ", ".join(".".join(map(str, root)) or "the top" for root in sorted(roots, key=str))
            found = f"{len(roots)}{': ' + where if roots else ''}"
            raise ValueError(f"expected one optimizer in the checkpoint, found {found}")
        return roots.pop()

    def load(self, keys: Sequence[str]) -> dict[str, Any]:
        """Some values, whole, on the CPU."""
        wanted: dict[str, Any] = {}
        for key in keys:
            stored = self.metadata.state_dict_metadata[key]
            wanted[key] = None
            if isinstance(stored, TensorStorageMetadata):
                wanted[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        try:
            reader = _Reader(self.directory, self.metadata)
            load(wanted, storage_reader=reader, planner=_SafePlanner(), no_dist=True)
        except CheckpointException as error:  # a BaseException
            first = next(iter(error.failures.values()))[0]
            raise ValueError(f"cannot be read: {str(first).splitlines()[0]}") from error
        return wanted


class _Reader(FileSystemReader):
    """The file system's reader, given the metadata."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _SafePlanner(DefaultLoadPlanner):
    """The default planner, that does not unpickle objects."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        self.original_state_dict[read_item.dest_index.fqn] = loaded
        self.state_dict[read_item.dest_index.fqn] = loaded
