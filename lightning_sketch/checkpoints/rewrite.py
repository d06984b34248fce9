"""Rewrite a checkpoint: plain states, another policy, or another number of shards."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sketch.checkpoints.contents import (
    SavedLayer,
    SavedOptimizer,
    as_float_tensor,
    encode_states,
    from_state_dict,
)
from lightning_sketch.checkpoints.formats.deepspeed import rank_files, stage0_file, stage0_state_dict
from lightning_sketch.checkpoints.formats.safe import load_file
from lightning_sketch.checkpoints.integrity import large, verify
from lightning_sketch.checkpoints.open import find_state_dict, read_checkpoint
from lightning_sketch.codecs import Keep
from lightning_sketch.layers.dtensor_states import SHARD_DIM, SHARD_STEPS, SHARDS, replicated, tensor_axes
from lightning_sketch.layers.record import RECORDS, LayerPart, LayerRecord
from lightning_sketch.layers.reshard import LazyTensor, Source, fill_dense
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.optimizer.state_dict import LAYOUT
from lightning_sketch.policy.plan import make_plan
from lightning_sketch.policy.policy import Policy, PolicyLike, as_policy
from lightning_sketch.rules import rule_of_group
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.dtensor import even_shard
from lightning_sketch.text import human_bytes, table

#: The layers of a checkpoint that are to be compressed, by name.
Decide = Callable[[SavedOptimizer], Mapping[str, LayerRecord]]


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did.

    Args:
        errors: relative error of every state that was encoded anew, by layer and state (the largest of all shards).
        bytes_before: bytes of the optimizer's tensors in the old checkpoint.
        bytes_after: in the new one.
    """

    errors: Mapping[str, Mapping[str, float]]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        """Bytes, and the relative error of every state that was encoded anew."""
        rows: list[tuple[str, ...] | None] = [
            (fqn, ", ".join(f"{state} {error:.3g}" for state, error in errors.items()))
            for fqn, errors in self.errors.items()
        ]
        sizes = f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        columns = ("layer", "relative error of its states")
        return table("converted checkpoint", columns, [*rows, None, ("optimizer states", sizes)])


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["plain", "compressed"],
    policy: PolicyLike = None,
    model: nn.Module | None = None,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Conversion:
    """Rewrite a checkpoint's optimizer states; everything else in it is copied.

    A file becomes a file of the same structure, a torch.distributed.checkpoint directory one of the same keys. A
    DeepSpeed directory becomes a file with an optimizer state dict: keyed by parameter name, for
    ``torch.distributed.checkpoint.state_dict.set_optimizer_state_dict`` or `restore`; at stage 0 numbered, if
    DeepSpeed's was. All optimizers in a checkpoint are converted.

    Old states are read in blocks of rows, and all checksums are verified. A directory is written layer by layer; a file
    is written at once, and all new states of it are in memory before.

    Args:
        source: see `read_checkpoint`.
        destination: must not exist; its folder must.
        to: "plain", states as the plain torch optimizer loads them; or "compressed".
        policy: with "compressed": how, as of `compress`; but ``None`` keeps what the checkpoint was written under.
        model: the model, on any device, the meta device included; gives `policy` roles, and names to checkpoints that
            number their parameters (in ``model.parameters()`` order).
        world_size: with "compressed": for how many FSDP2 ranks, sharded by rows.
        dtype: of the parameters, in which plain states are kept.

    Raises:
        FileExistsError: `destination` exists.
        FileNotFoundError: its folder does not.
        ValueError: the checkpoint cannot be read or does not fit `model`; `compress` would refuse the policy; or
            options contradict each other.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists; name another destination")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(f"{destination.parent} is no folder; make it first, or name another destination")
    if to == "plain" and (policy is not None or world_size != 1):
        raise ValueError("a plain checkpoint has no policy, and no number of ranks: leave both out")
    if policy is not None and model is None:
        raise ValueError("a policy needs the model, which gives its layers names, modules and roles")
    decide: Decide = _plain if to == "plain" else _as_it_was
    if policy is not None and model is not None:
        decide = _by_policy(as_policy(policy), model)
    rewrite = _Rewrite(decide, world_size, dtype)
    if source.is_file():
        container = _load_verified(source)
        new = {id(old): _rewrite_file(rewrite, old, model) for old in _state_dicts(container)}
        _write_file(destination, _replaced(container, new))
    elif (source / ".metadata").is_file():
        _convert_directory(source, destination, rewrite)
    elif not rank_files(source) and (file := stage0_file(source)):
        old, pieces = stage0_state_dict(file)
        if all(LAYOUT not in entry for entry in old["state"].values()):
            verify(large(pieces))
            _write_file(destination, _rewrite_file(rewrite, old, model))
        else:
            _write_file(destination, rewrite.state_dict(read_checkpoint(source), numbered=False))
    else:
        _write_file(destination, rewrite.state_dict(read_checkpoint(source), numbered=False))
    return Conversion(rewrite.errors, rewrite.bytes_before, rewrite.bytes_after)


def _load_verified(path: Path) -> Any:
    contents, pieces = load_file(path)
    verify(large(pieces))
    return contents


def _rewrite_file(rewrite: _Rewrite, old: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """Rewrite one state dict that is in memory, or mapped into it."""
    saved = from_state_dict(old, _names(old, model))
    _check_shapes(saved, model)
    return rewrite.state_dict(saved, numbered=_numbered(old))


def _convert_directory(source: Path, destination: Path, rewrite: _Rewrite) -> None:
    """Rewrite all optimizers of a torch.distributed.checkpoint, layer by layer, and copy the rest of it."""
    from lightning_sketch.checkpoints.formats import dcp  # slow to import

    stored = dcp.Directory(source)
    found = {root: dcp.read_dcp(stored, root) for root in stored.roots()}
    groups = {root: rewrite.groups(saved, numbered=False) for root, (saved, _) in found.items()}
    for _, pieces in found.values():
        verify(large(pieces))
    with dcp.DcpWriter(destination) as writer:
        dcp.copy_others(stored, writer)
        for root, (saved, _) in found.items():
            flat = root in stored.flat_roots
            if flat:
                for group in groups[root]:
                    options = {option: value for option, value in group.items() if option != "params"}
                    for fqn in group["params"]:
                        writer.add(root, dcp.flattened("param_groups", fqn, options))
            else:
                writer.add((*root, "param_groups"), groups[root])
            for fqn, entry in rewrite.entries(saved, numbered=False):
                if flat:
                    writer.add(root, dcp.flattened("state", fqn, entry))
                else:
                    writer.add((*root, "state", fqn), entry)


class _Rewrite:
    """Makes a state dict of a checkpoint, one layer at a time."""

    def __init__(self, decide: Decide, world_size: int, dtype: torch.dtype) -> None:
        self.decide, self.world_size, self.dtype = decide, world_size, dtype
        self.errors: dict[str, dict[str, float]] = {}
        self.bytes_before = self.bytes_after = 0

    def state_dict(self, saved: SavedOptimizer, *, numbered: bool) -> dict[str, Any]:
        """All of it, in memory."""
        groups = self.groups(saved, numbered=numbered)
        return {"state": dict(self.entries(saved, numbered=numbered)), "param_groups": groups}

    def groups(self, saved: SavedOptimizer, *, numbered: bool) -> list[dict[str, Any]]:
        """The parameter groups, with the records of what is compressed."""
        groups: list[dict[str, Any]] = []
        decided = self.decide(saved)
        for group, keys in zip(saved.groups, _keys(saved, numbered), strict=True):
            records = [decided[fqn].to_record() if fqn in decided else None for fqn in group["params"]]
            options = {k: v for k, v in group.items() if k != "params"}
            compressed = {RECORDS: records} if self.decide is not _plain else {}
            groups.append(options | compressed | {"params": keys})
        return groups

    def entries(self, saved: SavedOptimizer, *, numbered: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The states, one parameter after the other."""
        decided = self.decide(saved)
        for group, keys in zip(saved.groups, _keys(saved, numbered), strict=True):
            for fqn, key in zip(group["params"], keys, strict=True):
                layer = saved.layers.get(fqn)
                if layer is not None:
                    yield key, self._entry(layer, decided.get(fqn), group)

    def _entry(self, saved: SavedLayer, decided: LayerRecord | None, group: Mapping[str, Any]) -> dict[str, Any]:
        if saved.layer is not None and saved.layer.stock_count is not None:
            raise ValueError(
                f"{saved.fqn} was written by an optimizer that has no update rule of ours, and what it keeps beside "
                "its states only its own step knows: use decompress_state_dict(state_dict), or load the checkpoint "
                "into the optimizer, converted under the policy that it was written under"
            )
        sources = saved.states()
        self.bytes_before += sum(_nbytes(source.tensors) for found in sources.values() for source in found)
        old = saved.layer
        param = torch.empty(saved.shape, dtype=self.dtype, device="meta")
        if decided is None:
            names = list(old.codecs) if old is not None else list(sources)
            layer = LayerRecord(saved.fqn, 0, saved.shape, dict.fromkeys(names, True), dict.fromkeys(names, Keep()))
            part = LayerPart(layer, Shard.whole(saved.shape))
            entry: dict[str, Any] = {name: torch.zeros(saved.shape, dtype=self.dtype, device="cpu") for name in names}
            for name, found in sources.items():
                spec = dataclasses.replace(part.spec(name, param, {}), device=torch.device("cpu"))
                fill_dense(spec, found, part.shard.as_rows(entry[name]))
        else:
            entry = self._shards(saved, sources, decided, group, param)
        if decided is not None or (saved.step is not None and list(entry) != ["momentum_buffer"]):  # SGD does not count
            in_python = decided is None and "exp_avg" in entry and "weight_decay" not in group  # SparseAdam
            entry["step"] = int(saved.step or 0) if in_python else as_float_tensor(saved.step)
        self.bytes_after += _nbytes(entry)
        return entry

    def _shards(
        self,
        saved: SavedLayer,
        sources: Mapping[str, list[Source]],
        decided: LayerRecord,
        group: Mapping[str, Any],
        param: Tensor,
    ) -> dict[str, Any]:
        parts = []
        shards = [Shard.whole(decided.shape)]
        if self.world_size > 1:
            shards = [even_shard(decided.shape, 0, self.world_size, i, agree=True) for i in range(self.world_size)]
        for shard in shards:
            part = LayerPart(decided, shard)
            specs = {
                state: dataclasses.replace(part.spec(state, param, group), device=torch.device("cpu"))
                for state in decided.persistent_codecs()
            }
            tensors: dict[str, Any] = {}
            for state, encoded, error in encode_states(saved, sources, specs, decided):
                tensors |= encoded
                if error is not None:
                    errors = self.errors.setdefault(saved.fqn, {})
                    errors[state] = max(error, errors.get(state, 0.0))
            parts.append(tensors)
        if self.world_size == 1:
            return parts[0]
        axes, same = tensor_axes(decided), replicated(LayerPart(decided, shards[0]))
        joined: dict[str, Any] = {}
        for key in parts[0]:
            if key in same:
                joined[key] = parts[0][key]
                continue
            values = [part[key] for part in parts]
            # Scales have no axes, and shards may differ in them.
            joined[key] = torch.cat(values) if 0 in axes.get(key, ()) else torch.stack(values)
        if any(0 not in axes.get(key, ()) for key in joined):
            joined[SHARD_STEPS] = as_float_tensor(saved.step).to(torch.float64).repeat(self.world_size)
        return joined | {SHARDS: self.world_size, SHARD_DIM: 0}


def _keys(saved: SavedOptimizer, numbered: bool) -> list[Sequence[Any]]:
    """For each group the keys of its parameters in a state dict."""
    numbers = itertools.count()
    return [[next(numbers) if numbered else fqn for fqn in group["params"]] for group in saved.groups]


def _plain(saved: SavedOptimizer) -> Mapping[str, LayerRecord]:
    return {}


def _as_it_was(saved: SavedOptimizer) -> Mapping[str, LayerRecord]:
    return {fqn: found.layer for fqn, found in saved.layers.items() if found.layer is not None}


def _by_policy(policy: Policy, model: nn.Module) -> Decide:
    """What ``compress(optimizer, model, policy)`` would decide about the optimizer that wrote a checkpoint."""
    params = {named.fqn: named.param for named in named_layers(model).values()}

    def decide(saved: SavedOptimizer) -> Mapping[str, LayerRecord]:
        for fqn in saved.layers:
            if fqn not in params:
                raise ValueError(f"the checkpoint holds {fqn}, which is no parameter of the model")
        _check_shapes(saved, model)
        rule = rule_of_group(saved.groups[0])
        groups = [
            {**group, "params": [params[fqn] for fqn in group["params"] if fqn in params]} for group in saved.groups
        ]
        planned = make_plan(model, groups, rule, policy).layers
        compressed = {x.layer.fqn: x.layer for x in planned if x.layer.compressed and x.layer.fqn in saved.layers}
        for fqn, layer in compressed.items():
            if unknown := sorted(set(saved.layers[fqn].states()) - set(layer.codecs)):
                raise ValueError(
                    f"{fqn} has {', '.join(unknown)} in the checkpoint, which {rule.name} with the options of its "
                    "parameter group does not keep"
                )
        return compressed

    return decide


def _names(old: Mapping[str, Any], model: nn.Module | None) -> list[list[str]]:
    """Names of the numbered parameters of a state dict."""
    names: list[list[str]] = []
    for group in old["param_groups"]:
        records = group.get(RECORDS) or [None] * len(group["params"])
        names.append(
            [
                LayerRecord.from_record(record).fqn if record else f"parameter {key}"
                for key, record in zip(group["params"], records, strict=True)
            ]
        )
    if model is None or not _numbered(old):
        return names
    if len(names) > 1 and any(name.startswith("parameter ") for group in names for name in group):
        raise ValueError(
            "the checkpoint numbers its parameters over several groups, so the model does not tell which is which; "
            "load it into a converted optimizer instead, which encodes it"
        )
    known = {name for group in names for name in group}
    rest = iter([named.fqn for named in named_layers(model).values() if named.fqn not in known])
    return [[next(rest, name) if name.startswith("parameter ") else name for name in group] for group in names]


def _state_dicts(container: Any) -> list[Mapping[str, Any]]:
    """All optimizers' state dicts in a file."""
    several = container.get("optimizer_states") if isinstance(container, Mapping) else None
    count = len(several) if isinstance(several, list) and several else 1
    return [find_state_dict(container, number) for number in range(count)]


def _check_shapes(saved: SavedOptimizer, model: nn.Module | None) -> None:
    shapes = {} if model is None else {named.fqn: named.shape for named in named_layers(model).values()}
    for fqn, layer in saved.layers.items():
        if fqn in shapes and layer.shape != shapes[fqn]:
            raise ValueError(
                f"{fqn} has shape {list(layer.shape)} in the checkpoint, {list(shapes[fqn])} in the model; a "
                "checkpoint that numbers its parameters must have them in the model's order"
            )


def _numbered(old: Mapping[str, Any]) -> bool:
    return not any(isinstance(key, str) for group in old["param_groups"] for key in group["params"])


def _replaced(container: Any, new: Mapping[int, dict[str, Any]]) -> Any:
    """The container with state dicts in it replaced by others.

    Args:
        new: by the id of the old one.
    """
    if id(container) in new:
        return {**container, **new[id(container)]}
    if isinstance(container, Mapping):
        return {key: _replaced(value, new) for key, value in container.items()}
    if isinstance(container, list):
        return [_replaced(value, new) for value in container]
    return container


def _write_file(destination: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = destination.with_name(destination.name + ".partial")
    try:
        torch.save(value, partial)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


def _nbytes(tensors: Mapping[str, Any]) -> int:
    return sum(value.nbytes for k, value in tensors.items() if isinstance(value, Tensor | LazyTensor) and k != "step")
