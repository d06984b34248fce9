"""Rewrite a checkpoint: plain states, another policy, or another number of shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sketch.codecs import Keep
from lightning_sketch.dtensor_state import SHARD_DIM, SHARDS, tensor_axes
from lightning_sketch.kernels.reference import layer_seed
from lightning_sketch.layer import RECORDS, Layer, LayerShard
from lightning_sketch.policy import Policy
from lightning_sketch.portable.read import find_state_dict, read_checkpoint
from lightning_sketch.portable.safe import load_file
from lightning_sketch.portable.saved import (
    SavedLayer,
    SavedOptimizer,
    as_float_tensor,
    encode_states,
    from_state_dict,
)
from lightning_sketch.reshard import Source, dense_of
from lightning_sketch.roles import named_layers
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.dtensor import even_shard

Decide = Callable[[SavedLayer, Mapping[str, Any]], Layer | None]


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


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["plain", "compressed"],
    policy: Policy | None = None,
    model: nn.Module | None = None,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Conversion:
    """Rewrite a checkpoint's optimizer states; everything else in it is copied.

    A file becomes a file of the same structure, a torch.distributed.checkpoint directory one of the same keys. A
    DeepSpeed directory becomes a file with an optimizer state dict keyed by parameter name, for
    ``torch.distributed.checkpoint.state_dict.set_optimizer_state_dict`` or `restore`.

    Args:
        source: see `read_checkpoint`.
        destination: must not exist.
        to: "plain", states as the plain torch optimizer loads them; or "compressed".
        policy: with "compressed": how. ``None`` keeps what the checkpoint was written under.
        model: the model, on any device, the meta device included; gives `policy` roles, and names to checkpoints that
            number their parameters (in ``model.parameters()`` order).
        world_size: with "compressed": for how many FSDP2 ranks, sharded by rows.
        dtype: of the parameters, in which plain states are kept.

    Raises:
        FileExistsError: `destination` exists.
        ValueError: the checkpoint cannot be read or does not fit `model`; or options contradict each other.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists; name another destination")
    if to == "plain" and (policy is not None or world_size != 1):
        raise ValueError("a plain checkpoint has no policy, and no number of ranks: leave both out")
    if policy is not None and model is None:
        raise ValueError("a policy needs the model, which gives its layers names, modules and roles")
    decide: Decide = _plain if to == "plain" else (_by_policy(policy, model) if policy and model else _as_it_was)
    rewrite = _Rewrite(decide, world_size, dtype)
    if source.is_file():
        container = load_file(source)
        new: dict[int, dict[str, Any]] = {}
        for old in _state_dicts(container):
            saved = from_state_dict(old, _names(old, model))
            _check_shapes(saved, model)
            new[id(old)] = rewrite(saved, numbered=_numbered(old))
        _write_file(destination, _replaced(container, new))
    else:
        from lightning_sketch.portable import dcp  # slow to import

        saved = read_checkpoint(source)
        states = rewrite(saved, numbered=False)
        if dcp.is_dcp(source):
            dcp.write_dcp(source, destination, states)
        else:
            _write_file(destination, states)
    return Conversion(rewrite.errors, rewrite.bytes_before, rewrite.bytes_after)


class _Rewrite:
    """Makes a state dict of a checkpoint, one layer at a time."""

    def __init__(self, decide: Decide, world_size: int, dtype: torch.dtype) -> None:
        self.decide, self.world_size, self.dtype = decide, world_size, dtype
        self.errors: dict[str, dict[str, float]] = {}
        self.bytes_before = self.bytes_after = 0

    def __call__(self, saved: SavedOptimizer, *, numbered: bool) -> dict[str, Any]:
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        number = 0
        for group in saved.groups:
            keys: list[Any] = []
            records: list[str | None] = []
            for fqn in group["params"]:
                key = number if numbered else fqn
                number += 1
                keys.append(key)
                layer = saved.layers.get(fqn)
                decided = None if layer is None else self.decide(layer, group)
                records.append(None if decided is None else decided.to_record())
                if layer is not None:
                    state[key] = self._entry(layer, decided, group)
            options = {k: v for k, v in group.items() if k != "params"}
            compressed = {RECORDS: records} if self.decide is not _plain else {}
            groups.append(options | compressed | {"params": keys})
        return {"state": state, "param_groups": groups}

    def _entry(self, saved: SavedLayer, decided: Layer | None, group: Mapping[str, Any]) -> dict[str, Any]:
        sources = saved.states()
        self.bytes_before += sum(_nbytes(source.tensors) for found in sources.values() for source in found)
        old = saved.layer
        param = torch.empty(saved.shape, dtype=self.dtype, device="meta")
        if decided is None:
            names = list(old.codecs) if old is not None else list(sources)
            layer = Layer(saved.fqn, 0, saved.shape, dict.fromkeys(names, True), dict.fromkeys(names, Keep()))
            part = LayerShard(layer, Shard.whole(saved.shape))
            entry: dict[str, Any] = {name: torch.zeros(saved.shape, dtype=self.dtype) for name in names}
            for name, found in sources.items():
                spec = dataclasses.replace(part.spec(name, param, {}), device=torch.device("cpu"))
                entry[name] = dense_of(spec, found).view(saved.shape)
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
        decided: Layer,
        group: Mapping[str, Any],
        param: Tensor,
    ) -> dict[str, Any]:
        parts = []
        for rank in range(self.world_size):
            whole = self.world_size == 1
            shard = Shard.whole(decided.shape) if whole else even_shard(decided.shape, 0, self.world_size, rank)
            part = LayerShard(decided, shard)
            specs = {
                state: dataclasses.replace(part.spec(state, param, group), device=torch.device("cpu"))
                for state in decided.stored()
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
        axes = tensor_axes(decided)
        joined: dict[str, Any] = {}
        for key in parts[0]:
            values = [part[key] for part in parts]
            if key not in axes:
                joined[key] = torch.tensor(values, dtype=torch.float64)  # scales: shards may differ
            else:
                joined[key] = torch.cat(values) if 0 in axes[key] else torch.stack(values)
        return joined | {SHARDS: self.world_size, SHARD_DIM: 0}


def _plain(saved: SavedLayer, group: Mapping[str, Any]) -> Layer | None:
    return None


def _as_it_was(saved: SavedLayer, group: Mapping[str, Any]) -> Layer | None:
    return saved.layer


def _by_policy(policy: Policy, model: nn.Module) -> Decide:
    layers = named_layers(model, policy.role_hints)
    rules = policy.assign(layers)
    chosen = {named.fqn: policy.rules[rules[key]] for key, named in layers.items() if key in rules}
    known = {named.fqn for named in layers.values()}

    def decide(saved: SavedLayer, group: Mapping[str, Any]) -> Layer | None:
        if saved.fqn not in known:
            raise ValueError(f"the checkpoint holds {saved.fqn}, which is no parameter of the model")
        rule = chosen.get(saved.fqn)
        signed = saved.layer.signed if saved.layer is not None else _signs(saved)
        if rule is None:
            return None
        codecs = {state: rule.codec_for(state, signed=positive) for state, positive in signed.items()}
        seed = layer_seed(policy.seed, saved.fqn)
        layer = Layer(saved.fqn, seed, saved.shape, dict(signed), codecs)
        part = LayerShard(layer, Shard.whole(saved.shape))
        for state, codec in codecs.items():
            codec.check(part.spec(state, torch.empty(saved.shape, device="meta"), group))
        return layer if layer.compressed else None

    return decide


def _signs(saved: SavedLayer) -> dict[str, bool]:
    """Which states may be negative, by torch's names."""
    return {state: state not in ("exp_avg_sq", "sum", "square_avg", "max_exp_avg_sq") for state in saved.states()}


def _names(old: Mapping[str, Any], model: nn.Module | None) -> list[list[str]]:
    """Names of the numbered parameters of a state dict."""
    names: list[list[str]] = []
    for group in old["param_groups"]:
        records = group.get(RECORDS) or [None] * len(group["params"])
        names.append(
            [
                Layer.from_record(record).fqn if record else f"parameter {key}"
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
    torch.save(value, partial)
    partial.replace(destination)


def _nbytes(tensors: Mapping[str, Any]) -> int:
    return sum(value.nbytes for key, value in tensors.items() if isinstance(value, Tensor) and key != "step")
