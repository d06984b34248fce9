"""Read and write the optimizer states of a torch.distributed.checkpoint directory, layer by layer, on one process."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from lightning_sketch.checkpoints.contents import SavedOptimizer, from_entry
from lightning_sketch.checkpoints.formats.safe import check_metadata
from lightning_sketch.checkpoints.formats.stored import Chunk, LazyFileTensor
from lightning_sketch.checkpoints.integrity import Piece, small, verify
from lightning_sketch.layers.dtensor_states import tensor_axes
from lightning_sketch.layers.record import RECORDS, LayerRecord

Path_ = tuple[Any, ...]

#: The parts of an optimizer's state dict.
_OWN = (("state",), ("param_groups",))

#: Bytes that are gathered before they are written into one file.
_FILE_BYTES = 1 << 26


def is_dcp(directory: Path) -> bool:
    """Whether `directory` is a torch.distributed.checkpoint."""
    return (directory / ".metadata").is_file()


class Directory:
    """A checkpoint's directory; its metadata are checked and read once.

    Raises:
        ValueError: its metadata are damaged or hostile.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        check_metadata(directory / ".metadata")
        self.metadata: Metadata = FileSystemReader(directory).read_metadata()
        paths: dict[Path_, str] = {tuple(path): key for key, path in (self.metadata.planner_data or {}).items()}
        #: Where optimizers' state dicts are that were flattened, as torch's ``flatten_optimizer_state_dict`` does.
        self.flat_roots = {path[:-1] for path in paths if str(path[-1]).startswith("param_groups.")}
        self.paths = {_nested(path) if path[:-1] in self.flat_roots else path: key for path, key in paths.items()}

    def roots(self) -> list[Path_]:
        """Where in the checkpoint optimizers' state dicts are, at least one.

        Raises:
            ValueError: there is none.
        """
        found = {path[: path.index("param_groups")] for path in self.paths if "param_groups" in path}
        if not found:
            raise ValueError("expected one optimizer in the checkpoint, found 0")
        return sorted(found, key=str)

    def root(self, number: int) -> Path_:
        """Where the one optimizer's state dict is; or that of optimizer `number`, if they are numbered.

        Raises:
            ValueError: there is none, or it is not clear which.
        """
        roots = self.roots()
        if len(roots) > 1 and all(root and re.fullmatch(r"optimizer_\d+", str(root[-1])) for root in roots):
            roots = [root for root in roots if root[-1] == f"optimizer_{number}"]
        if len(roots) != 1:
            where = ", ".join(".".join(map(str, root)) or "the top" for root in roots)
            raise ValueError(f"expected one optimizer in the checkpoint, found {len(roots)}{where and ': ' + where}")
        return roots[0]

    def inside(self, root: Path_) -> dict[Path_, str]:
        """The keys of an optimizer's state dict, by their paths below it."""
        depth = len(root)
        return {p[depth:]: key for p, key in self.paths.items() if p[:depth] == root and p[depth : depth + 1] in _OWN}

    def pieces(self, keys: Iterable[str]) -> list[Piece]:
        """Where some values lie in the files."""
        wanted, found = set(keys), []
        for index, info in self.metadata.storage_data.items():
            if index.fqn in wanted:
                if getattr(info, "transform_descriptors", None):
                    raise ValueError(f"{index.fqn} was written through {info.transform_descriptors}, which is not read")
                path = self.directory / info.relative_path
                found.append(Piece(path, info.offset, info.length, "", info.length))
        return found

    def tensor(self, key: str) -> LazyFileTensor:
        """A tensor that stays in the files."""
        stored = self.metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        chunks = []
        for place in stored.chunks:
            info = self.metadata.storage_data.get(MetadataIndex(key, place.offsets))
            if info is None:
                raise ValueError(f".metadata cannot be trusted: it does not say where {key} is")
            piece = Piece(self.directory / info.relative_path, info.offset, info.length, "", info.length)
            chunks.append(Chunk(piece, tuple(zip(place.offsets, place.sizes, strict=True))))
        return LazyFileTensor(chunks, tuple((0, size) for size in stored.size), stored.properties.dtype)

    def is_large(self, key: str) -> bool:
        """Whether a value is a tensor of at least one dimension."""
        stored = self.metadata.state_dict_metadata[key]
        return isinstance(stored, TensorStorageMetadata) and len(stored.size) > 0

    def load(self, keys: Sequence[str]) -> dict[str, Any]:
        """Some values, whole, on the CPU.

        Raises:
            ValueError: they cannot be read.
        """
        wanted: dict[str, Any] = {}
        for key in keys:
            stored = self.metadata.state_dict_metadata[key]
            wanted[key] = None
            if isinstance(stored, TensorStorageMetadata):
                wanted[key] = torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")
        try:
            reader = _Reader(self.directory, self.metadata)
            # Each rank reads for itself, whether there are others or not; `load` cannot be told so in older versions.
            _load_state_dict(wanted, reader, no_dist=True, planner=_SafePlanner())
        except CheckpointException as error:  # a BaseException
            first = next(iter(error.failures.values()))[0]
            raise ValueError(f"cannot be read: {str(first).splitlines()[0]}") from error
        return wanted


def _nested(path: Path_) -> Path_:
    """The path of a value in a flattened state dict as it would be in one that is not, but for groups' numbers.

    >>> _nested(("optimizer", "state.head.weight.exp_avg")), _nested(("optimizer", "param_groups.head.weight.lr"))
    (('optimizer', 'state', 'head.weight', 'exp_avg'), ('optimizer', 'param_groups', 'head.weight', 'lr'))
    """
    part, _, rest = str(path[-1]).partition(".")
    fqn, _, name = rest.rpartition(".")
    return (*path[:-1], part, fqn, name) if fqn and (part,) in _OWN else path


def flattened(part: str, fqn: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a parameter as they are in a flattened state dict.

    Args:
        part: "state" or "param_groups".
    """
    return {f"{part}.{fqn}.{name}": value for name, value in values.items()}


def read_dcp(stored: Directory, root: Path_) -> tuple[SavedOptimizer, list[Piece]]:
    """Read an optimizer's state dict of ``torch.distributed.checkpoint.state_dict``, at any depth of a checkpoint.

    Tensors stay in the files, and are read row by row when states are asked for.

    Returns:
        the optimizer, and where in the files it lies; what is small there was verified.

    Raises:
        ValueError: it cannot be read.
    """
    inside = stored.inside(root)
    pieces = stored.pieces(inside.values())
    verify(small(pieces))
    entries: dict[str, dict[str, str]] = {}
    for path, key in inside.items():
        if path[0] == "state" and len(path) == 3:
            entries.setdefault(path[1], {})[path[2]] = key
    groups = _groups(stored, inside)
    decided = {
        layer.fqn: layer for group in groups for record in group.pop(RECORDS, ()) if record
        for layer in [LayerRecord.from_record(record)]
    }  # fmt: skip
    lazy = {
        key
        for fqn, keys in entries.items()
        for name, key in keys.items()
        if stored.is_large(key) and (fqn not in decided or name in tensor_axes(decided[fqn]))
    }
    values = stored.load([key for keys in entries.values() for key in keys.values() if key not in lazy])
    layers = {}
    for fqn, keys in entries.items():
        entry = {name: stored.tensor(key) if key in lazy else values[key] for name, key in keys.items()}
        layers[fqn] = from_entry(fqn, entry, decided.get(fqn))
    return SavedOptimizer(layers, groups), pieces


class DcpWriter:
    """Writes a checkpoint value by value, so that never more than some are in memory.

    A context manager: the directory appears when all went well, or not at all.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.partial = destination.with_name(destination.name + ".partial")
        self.writer = FileSystemWriter(self.partial)
        self.plans: list[SavePlan] = []
        self.results: list[list[WriteResult]] = []
        self.paths: dict[str, Path_] = {}
        self.waiting: dict[str, Any] = {}
        self.bytes = 0

    def __enter__(self) -> DcpWriter:
        shutil.rmtree(self.partial, ignore_errors=True)  # of a conversion that was killed
        self.writer.set_up_storage_writer(is_coordinator=True)
        return self

    def add(self, path: Path_, value: Any) -> None:
        """A value, with its place in the state dict; dictionaries in it are flattened as torch does."""
        for place, leaf in _leaves(value, path):
            key = ".".join(map(str, place))
            self.paths[key], self.waiting[key] = place, leaf
            self.bytes += leaf.nbytes if isinstance(leaf, Tensor) else 0
        if self.bytes >= _FILE_BYTES:
            self._flush()

    def _flush(self) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(self.waiting, is_coordinator=True)
        plan = self.writer.prepare_local_plan(planner.create_local_plan())
        plan = dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{len(self.plans)}_"))  # as if of another rank
        self.results.append(self.writer.write_data(plan, planner).wait())
        self.plans.append(plan)
        self.waiting, self.bytes = {}, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                _, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(self.plans)
                self.writer.finish(dataclasses.replace(metadata, planner_data=self.paths), self.results)
                self.partial.replace(self.destination)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)


def copy_others(stored: Directory, writer: DcpWriter) -> None:
    """Copy everything that is not of an optimizer's state dict, one value after the other."""
    own = {key for root in stored.roots() for key in stored.inside(root).values()}
    others = {path: key for path, key in stored.paths.items() if key not in own}
    verify(stored.pieces(others.values()))
    for path, key in others.items():
        writer.add(path, stored.load([key])[key])


def _leaves(value: Any, path: Path_) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


def _groups(stored: Directory, own: Mapping[Path_, str]) -> list[dict[str, Any]]:
    """The groups' options; lists and tuples come back as lists. Of a flattened state dict one for each parameter."""
    inside = {path[1:]: key for path, key in own.items() if path[0] == "param_groups"}
    loaded = stored.load(list(inside.values()))
    groups: dict[int | str, dict[str, Any]] = {}
    for (number, option, *rest), key in inside.items():
        group = groups.setdefault(number, {"params": [number]} if isinstance(number, str) else {})
        if rest:  # a list, item by item
            items = group.setdefault(option, {})
            items[rest[0]] = loaded[key]
        else:
            group[option] = loaded[key]
    for group in groups.values():
        for option, value in group.items():
            if isinstance(value, dict) and value and all(isinstance(index, int) for index in value):
                group[option] = [value[index] for index in sorted(value)]
    return [groups[number] for number in sorted(groups, key=str if any(isinstance(x, str) for x in groups) else None)]


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
