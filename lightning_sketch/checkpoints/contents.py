"""An optimizer's checkpoint by parameter name, whoever wrote it: each state as the shards that held it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sketch.codecs import Codec, StateSpec, allocate, key_of, scale_tensor
from lightning_sketch.layers.dtensor_states import SHARDS, sources, step_mismatch
from lightning_sketch.layers.record import RECORDS, LayerRecord
from lightning_sketch.layers.reshard import LazyTensor, Source, reshard
from lightning_sketch.layers.step_count import read_step, step_tensor
from lightning_sketch.sharding import Shard, is_dtensor


@dataclass(frozen=True)
class SavedLayer:
    """One parameter's states in a checkpoint.

    Args:
        fqn: the parameter's name.
        shape: its logical shape.
        step: how many steps it has made; ``None`` if its optimizer does not count (SGD).
        layer: what the policy had decided; ``None`` if the parameter was kept.
        states: called when they are wanted: the shards of each state, by torch's name. A dropped state is absent.
    """

    fqn: str
    shape: tuple[int, ...]
    step: float | None
    layer: LayerRecord | None
    states: Callable[[], dict[str, list[Source]]]

    def dropped(self, state: str) -> bool:
        """Whether the policy had dropped a state: it comes back as zeros."""
        codec = None if self.layer is None else self.layer.codecs.get(state)
        return codec is not None and codec.drops

    def lacks(self, states: Sequence[str], sources: Mapping[str, Any]) -> ValueError:
        """The error that states are missing."""
        return ValueError(f"{self.fqn} has no {', '.join(states)} in the checkpoint (it holds {sorted(sources)})")


@dataclass(frozen=True)
class SavedOptimizer:
    """A checkpoint of an optimizer.

    Args:
        layers: the parameters that have states, by name.
        groups: hyperparameters of each group, with ``params``, the names of its parameters.
    """

    layers: Mapping[str, SavedLayer]
    groups: Sequence[Mapping[str, Any]]

    def group_of(self, fqn: str) -> Mapping[str, Any]:
        """The group of a parameter."""
        return next(group for group in self.groups if fqn in group["params"])


def from_state_dict(state_dict: Mapping[str, Any], names: Sequence[Sequence[str]] | None = None) -> SavedOptimizer:
    """Read an optimizer's state dict, keyed by number or by name, without DTensors.

    Args:
        names: for each group the names of its parameters; needed where parameters are numbered.

    Raises:
        ValueError: it is no optimizer's state dict, holds DTensors, does not fit `names`, or is of another format
            version.
    """
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, Sequence) or not isinstance(state_dict.get("state"), Mapping):
        raise ValueError("not an optimizer's state dict: it has no 'state' and 'param_groups'")
    if not groups or (names is not None and len(names) != len(groups)):
        wanted = "" if names is None else f", not {len(names)}"
        raise ValueError(f"the checkpoint has {len(groups)} parameter groups{wanted}")
    layers: dict[str, SavedLayer] = {}
    named_groups: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        keys = list(group["params"])
        fqns = keys if all(isinstance(key, str) for key in keys) else _names_of(names, number, len(keys))
        decided = [LayerRecord.from_record(record) for record in group.get(RECORDS, ()) if record is not None]
        compressed = {layer.fqn: layer for layer in decided}
        for key, fqn in zip(keys, fqns, strict=True):
            if entry := state_dict["state"].get(key):
                layers[fqn] = from_entry(fqn, entry, compressed.get(fqn))
        unknown = sorted(set(compressed) - set(fqns))
        if unknown:
            raise ValueError(
                f"the checkpoint's group {number} holds {', '.join(unknown)}, which the optimizer's does not"
            )
        options = {key: value for key, value in group.items() if key not in ("params", RECORDS)}
        named_groups.append(options | {"params": fqns})
    return SavedOptimizer(layers, named_groups)


def from_entry(fqn: str, entry: Mapping[str, Any], layer: LayerRecord | None) -> SavedLayer:
    """Read one parameter's entry of a state dict, whose tensors may be lazy; see `from_state_dict`."""
    if any(isinstance(value, Tensor) and is_dtensor(value) for value in entry.values()):
        raise ValueError(f"{fqn} holds DTensors: gather the state dict first (full_state_dict=True)")
    step = None if entry.get("step") is None else read_step(entry["step"], fqn)
    if problem := step_mismatch(entry):
        raise ValueError(f"{fqn}: {problem}")
    if layer is not None:
        return SavedLayer(fqn, layer.shape, step, layer, lambda: dict(_compressed(layer, entry)))
    dense = {key: value for key, value in entry.items() if isinstance(value, Tensor | LazyTensor) and key != "step"}
    shape = max((tuple(value.shape) for value in dense.values()), key=len, default=())  # NAdam keeps a 0-d state, too
    whole = Shard.whole(shape)
    return SavedLayer(
        fqn, shape, step, None, lambda: {key: [Source(whole, {key: value}, None)] for key, value in dense.items()}
    )


def encode_states(
    found: SavedLayer, sources: Mapping[str, list[Source]], specs: Mapping[str, StateSpec], layer: LayerRecord
) -> Iterator[tuple[str, dict[str, Any], float | None]]:
    """Encode a layer's states for one new shard.

    Args:
        sources: ``found.states()``.
        specs: of the new shard's states, by name.
        layer: how they are to be stored.

    Yields:
        name, tensors under their keys in ``optimizer.state[param]``, and relative error; ``None`` for a state that was
        dropped and starts at zero.

    Raises:
        ValueError: a state is missing, or its parts do not cover the shard.
    """
    for state, codec in layer.persistent_codecs().items():
        if state in sources:
            yield state, *reshard(codec, specs[state], sources[state])
        elif found.dropped(state):
            yield state, allocate(codec, specs[state]), None
        else:
            raise found.lacks([state], sources)


def tensors_of(codec: Codec, state: str, ndim: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a layer's state dict that belong to one state.

    Raises:
        ValueError: one is missing, or the scale is damaged.
    """
    keys = [key_of(state, suffix) for suffix in codec.axes(ndim)]
    missing = [key for key in keys if not isinstance(entry.get(key), Tensor | LazyTensor)]
    if missing:
        raise ValueError(f"the checkpoint has no {', '.join(missing)} (it holds {sorted(map(str, entry))})")
    found = {key: entry[key] for key in keys}
    scale = key_of(state, "scale")
    if scale in entry:
        found[scale] = entry[scale] if SHARDS in entry else scale_tensor(entry[scale], scale)  # of shards, a stack
    return found


def _compressed(layer: LayerRecord, entry: Mapping[str, Any]) -> Iterator[tuple[str, list[Source]]]:
    whole = Shard.whole(layer.shape)
    for state, codec in layer.persistent_codecs().items():
        found = tensors_of(codec, state, max(1, len(layer.shape)), entry)
        if SHARDS in entry:
            yield state, list(sources(layer, state, codec, entry, whole))
        else:
            yield state, [Source(whole, found, codec, layer.seed, layer.signed[state])]


def _names_of(names: Sequence[Sequence[str]] | None, number: int, count: int) -> list[str]:
    if names is None:
        raise ValueError("the checkpoint numbers its parameters; their names are needed to move it")
    if len(names[number]) != count:
        raise ValueError(f"group {number} of the checkpoint has {count} parameters, not {len(names[number])}")
    return list(names[number])


def as_float_tensor(step: float | None) -> Tensor:
    """A step count as converted optimizers keep it. SGD counts none; its buffer exists, so one step was made."""
    return step_tensor(1.0 if step is None else step)
