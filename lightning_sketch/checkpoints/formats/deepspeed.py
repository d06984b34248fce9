"""Read the optimizer states that DeepSpeed's ranks saved, from a directory of ``engine.save_checkpoint``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_sketch.checkpoints.contents import SavedLayer, SavedOptimizer, from_state_dict, tensors_of
from lightning_sketch.checkpoints.formats.safe import load_file
from lightning_sketch.checkpoints.integrity import Piece
from lightning_sketch.codecs import Keep
from lightning_sketch.layers.flat import NamedSegment, flat_parts, layer_parts
from lightning_sketch.layers.record import RECORDS, LayerRecord
from lightning_sketch.layers.reshard import Source
from lightning_sketch.layers.step_count import read_step
from lightning_sketch.optimizer.state_dict import AGREED, LAYOUT
from lightning_sketch.sharding import Cut

_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")


def rank_files(directory: Path) -> list[Path]:
    """The ranks' optimizer files of a checkpoint, in rank order; none if it is not ZeRO's.

    Args:
        directory: of ``save_checkpoint`` (then its latest tag counts) or of one tag.

    Raises:
        ValueError: the name of the latest tag is missing.
    """
    paths = _tag(directory).glob("*.pt")
    found = [(int(match[1]), path) for path in paths if (match := _RANK_FILE.search(path.name))]
    return [path for _, path in sorted(found)]


def stage0_file(directory: Path) -> Path | None:
    """The file that holds model and optimizer where DeepSpeed partitions nothing; see `rank_files`.

    Raises:
        ValueError: there are several, one for each part of the model.
    """
    found = sorted(_tag(directory).glob("mp_rank_*_model_states.pt"))
    if len(found) > 1:
        raise ValueError(f"the model is split over {len(found)} files (tensor or pipeline parallelism)")
    return found[0] if found else None


def _tag(directory: Path) -> Path:
    latest = directory / "latest"
    if not latest.is_file():
        return directory
    name = latest.read_text().strip()
    if not name:
        raise ValueError("its file 'latest' is empty: a save ended in the middle; give the directory of a tag")
    return directory / name


def read_deepspeed(files: Sequence[Path]) -> tuple[SavedOptimizer, list[Piece]]:
    """Read ZeRO-1/2/3 checkpoints of converted optimizers.

    The files are memory-mapped and loaded with ``weights_only=True``, which is told of DeepSpeed's own plain classes.

    Args:
        files: of all ranks, from `rank_files`.

    Returns:
        the optimizer, and the pieces of all files.

    Raises:
        ValueError: a file is not of a converted optimizer, or is of another save than the others.
    """
    found: list[Piece] = []
    collected = _Collection()
    for path in files:
        contents, pieces = load_file(path, _harmless_globals())
        found += pieces
        collected.add(path, _client_state(path, contents))
    return collected.finish(), found


def read_stage0(path: Path, names: Sequence[Sequence[str]] | None) -> tuple[SavedOptimizer, list[Piece]]:
    """Read a checkpoint of stage 0; see `stage0_state_dict`.

    Args:
        names: for each parameter group the names of its parameters, which fp32 checkpoints number.
    """
    client, pieces = stage0_state_dict(path)
    if any(LAYOUT in entry for entry in client["state"].values()):
        collected = _Collection()
        collected.add(path, client)
        return collected.finish(), pieces
    return from_state_dict(client, names), pieces


def stage0_state_dict(path: Path) -> tuple[dict[str, Any], list[Piece]]:
    """The state dict of the client optimizer in a file of `stage0_file`, and the file's pieces.

    In fp32 it is what the client wrote. In bf16 and fp16 the client had fp32 copies of the parameters, and if it is a
    converted one it says which parameter each is.

    Raises:
        ValueError: there is none.
    """
    contents, pieces = load_file(path)
    client = contents.get("optimizer") if isinstance(contents, Mapping) else None
    if isinstance(client, Mapping) and "optimizer_state_dict" in client:
        client = client["optimizer_state_dict"]
    if not isinstance(client, Mapping) or "param_groups" not in client or "state" not in client:
        raise ValueError(f"{path.name} holds no optimizer; ZeRO keeps it in zero_pp_rank files, which are missing")
    return dict(client), pieces


class _Collection:
    """The layers of an optimizer, put together from its ranks' files."""

    def __init__(self) -> None:
        self.layers: dict[str, _Collected] = {}
        self.groups: list[dict[str, Any]] = []

    def add(self, path: Path, client: Mapping[str, Any]) -> None:
        """What one rank held."""
        records: dict[str, LayerRecord] = {}
        for group in client["param_groups"]:
            decided = [LayerRecord.from_record(record) for record in group.get(RECORDS, ()) if record is not None]
            records |= {layer.fqn: layer for layer in decided}
        rank_groups = [_options(group) | {"params": []} for group in client["param_groups"]]
        for number, group in enumerate(client["param_groups"]):
            for key in group["params"]:
                entry = client["state"].get(key)
                if entry:
                    rank_groups[number]["params"] += _collect(path, entry, records, self.layers)
        _merge(self.groups, rank_groups)

    def finish(self) -> SavedOptimizer:
        """The optimizer."""
        return SavedOptimizer({fqn: found.layer(fqn) for fqn, found in self.layers.items()}, self.groups)


class _Collected:
    """What has been found of one parameter so far."""

    def __init__(self, shape: tuple[int, ...], step: float | None, layer: LayerRecord | None) -> None:
        self.shape, self.step, self.decided = shape, step, layer
        self.states: dict[str, list[Source]] = {}

    def layer(self, fqn: str) -> SavedLayer:
        return SavedLayer(fqn, self.shape, self.step, self.decided, lambda: self.states)


def _collect(
    path: Path, entry: Mapping[str, Any], records: Mapping[str, LayerRecord], layers: dict[str, _Collected]
) -> list[str]:
    """Sort one flat tensor's states by parameter; the names of its parameters."""
    if LAYOUT not in entry:
        raise ValueError(
            f"{path.name} was not written by a converted optimizer. Load it into a converted one at the same world "
            "size and ZeRO stage, which encodes it, and save that"
        )
    segments = [NamedSegment.from_list(values) for values in entry[LAYOUT]]
    step = read_step(entry["step"], path.name) if "step" in entry else None
    for segment in segments:
        layer = layers.setdefault(segment.fqn, _Collected(segment.shape, step, records.get(segment.fqn)))
        if layer.step != step:
            raise ValueError(
                f"{path.name} holds {segment.fqn} at step {step}, another rank's file at step {layer.step}: the "
                "directory was overwritten in part, by a save that ended in the middle"
            )
    ours = any("]." in key for key in entry)  # some rank had a compressed layer in this tensor
    cut: Cut | None = "anywhere" if AGREED in entry else None
    parts = flat_parts(segments, records, cut) if ours else ()
    for part in parts:
        if part.layer.compressed:
            for state, codec in part.layer.persistent_codecs().items():
                found = tensors_of(codec, part.prefix + state, 1 + len(part.shard.row_shape), entry)
                plain = {key.removeprefix(part.prefix): value for key, value in found.items()}
                source = Source(part.shard, plain, codec, part.layer.seed, part.layer.signed[state])
                layers[part.layer.fqn].states.setdefault(state, []).append(source)
    kept = [(part.span, part.prefix) for part in parts if not part.layer.compressed and part.span is not None]
    if not parts:  # torch's own states over the whole flat tensor
        kept = [(slice(0, segments[-1].start + segments[-1].length), "")] if segments else []
    for span, prefix in kept:
        inside = [s for s in segments if s.fqn not in records and span.start <= s.start < span.stop]
        for key, value in entry.items():
            if key.startswith(prefix) and "[" not in key.removeprefix(prefix) and _is_state(key, value):
                for segment in inside:
                    _add_kept(layers[segment.fqn], key.removeprefix(prefix), value, segment, span.start)
    return [segment.fqn for segment in segments]


def _is_state(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and key != "step"


def _add_kept(layer: _Collected, state: str, flat: Tensor, segment: NamedSegment, origin: int) -> None:
    whole = LayerRecord(segment.fqn, 0, segment.shape, {}, {state: Keep()})
    for part in layer_parts(whole, segment):
        assert part.span is not None
        values = flat.reshape(-1)[part.span.start - origin : part.span.stop - origin]
        source = Source(part.shard, {state: part.shard.as_rows(values)}, None)
        layer.states.setdefault(state, []).append(source)


def _client_state(path: Path, saved: Any) -> dict[str, Any]:
    """The state dict of the optimizer that DeepSpeed wrapped."""
    wrapper = saved.get("optimizer_state_dict") or {}
    client = wrapper.get("base_optimizer_state") or wrapper.get("optimizer_state_dict")
    if not isinstance(client, Mapping) or "param_groups" not in client:
        raise ValueError(f"{path.name} holds no state of a client optimizer; is it a ZeRO checkpoint?")
    return dict(client)


def _harmless_globals() -> list[Any]:
    """Plain data classes that DeepSpeed puts into its files."""
    scaler = importlib.import_module("deepspeed.runtime.fp16.loss_scaler")
    config = importlib.import_module("deepspeed.runtime.zero.config")
    fragment = importlib.import_module("deepspeed.utils.tensor_fragment")
    return [scaler.LossScaler, scaler.DynamicLossScaler, config.ZeroStageEnum, fragment.fragment_address]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", RECORDS)}


def _merge(groups: list[dict[str, Any]], rank_groups: list[dict[str, Any]]) -> None:
    """Join the parameter names of one rank's groups to those of the others: a small layer may lie on one rank only."""
    if not groups:
        groups.extend(rank_groups)
        return
    for group, other in zip(groups, rank_groups, strict=True):
        group["params"] += [fqn for fqn in other["params"] if fqn not in group["params"]]
