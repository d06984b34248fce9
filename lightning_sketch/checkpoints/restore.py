"""Load a checkpoint of any engine and world size into a live optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.checkpoints.collectives import run_on_all_ranks, verify_together
from lightning_sketch.checkpoints.contents import (
    SavedLayer,
    SavedOptimizer,
    as_float_tensor,
    encode_states,
)
from lightning_sketch.checkpoints.open import Opened, open_checkpoint
from lightning_sketch.layers.dtensor_states import dense_like
from lightning_sketch.layers.flat import FlatTensor, NamedSegment, layer_parts
from lightning_sketch.layers.record import RECORDS, LayerPart, LayerRecord
from lightning_sketch.layers.reshard import Source, fill_dense
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.layers.step_count import step_tensor
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.lossy import warn_of_lossy
from lightning_sketch.optimizer.recode import ReplacedRecords
from lightning_sketch.optimizer.stock import StockOptimizer
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import global_shape, kept_shard_of, local, shard_of
from lightning_sketch.sharding.wrapper import wrapper_of

#: Options of the live group that a checkpoint does not change: what the class and the machine decide.
_HERE = {"params", RECORDS, "decoupled_weight_decay", "foreach", "fused", "capturable", "differentiable"}

#: Relative error of each state that was not moved exactly, by layer and state.
Errors = dict[str, dict[str, float]]


def restore(target: Any, path: str | Path, *, optimizer: int = 0) -> Errors:
    """Load optimizer states and hyperparameters from a checkpoint of another engine, world size or policy.

    Works between a single process, DDP, FSDP2 and DeepSpeed ZeRO-0/1/2/3, and between plain and compressed states.
    Weights are not touched: load them first, from DeepSpeed's checkpoints with its
    ``zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint``. Where the layout is the same, the engine's own loading is
    exact and faster.

    Collective where a process group is up: every rank calls it, and all succeed or none does. A rank reads of dense
    states the rows that it keeps, in blocks, and of compressed ones the old shards that its own overlaps. Each file's
    checksums are verified by one rank.

    Args:
        target: a converted optimizer, a trainer's wrapper of one, or a DeepSpeed engine that trains with one.
        path: see `read_checkpoint`. A checkpoint of plain states that numbers its parameters must have them in the
            optimizer's order.
        optimizer: which one, where a Lightning file holds several.

    Returns:
        the relative error of every state that was encoded anew, by layer and state; of this rank's part.

    Raises:
        TypeError: `target` is no converted optimizer, or one of a class that has no update rule of ours.
        ValueError: the checkpoint does not fit, or was altered. Nothing was changed then, on any rank.
    """
    wrapper, inner = wrapper_of(target), unwrap(target)
    if not isinstance(inner, CompressedOptimizer):
        raise TypeError(f"restore() needs a converted optimizer, got {type(inner).__name__}; call compress() first")
    if isinstance(inner, StockOptimizer):
        raise TypeError(
            f"restore() cannot move the states of {inner.stock.__name__}, which has no update rule of ours: what it "
            "keeps beside them only its own step knows. Load its own checkpoint, of as many shards, by load_state_dict "
            "or the trainer; from a compressed one decompress_state_dict(state_dict) makes a plain one"
        )

    def open_() -> Opened:
        if wrapper is not None:
            inner.bind(wrapper)
        model = inner.compression.model()
        order = None if model is None else [layer.fqn for layer in named_layers(model).values()]
        return open_checkpoint(path, inner.compression.names, optimizer=optimizer, order=order)

    found = run_on_all_ranks(open_)
    try:
        verify_together(found.unverified)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    loaded = run_on_all_ranks(lambda: _Restored(inner, found.saved))
    loaded.commit(wrapper)
    return loaded.errors


class _Restored:
    """New states, complete before any is put in place."""

    def __init__(self, optimizer: CompressedOptimizer, saved: SavedOptimizer) -> None:
        self.optimizer, self.saved = optimizer, saved
        self.errors: Errors = {}
        self.encoded: Errors = {}
        self._last: tuple[SavedLayer, dict[str, list[Source]]] | None = None
        self.states: list[tuple[Tensor, dict[str, Any]]] = []
        self.replaced = ReplacedRecords()
        names = {fqn for group in optimizer.compression.names for fqn in group}
        if unknown := sorted(set(saved.layers) - names):
            raise ValueError(f"the checkpoint holds states of {', '.join(unknown)}, which the optimizer does not train")
        if optimizer.compression.flat is None and not any(group["params"] for group in optimizer.param_groups):
            raise ValueError("the optimizer's parameters are in a DeepSpeed engine: give restore() the engine")
        if optimizer.compression.flat is not None:
            for flat in optimizer.compression.flat:
                self.states.append((flat.tensor, self._flat(flat)))
        else:
            self._parameters()

    def commit(self, wrapper: Any | None) -> None:
        """Put everything in place."""
        self.replaced.put(self.optimizer.compression)
        for tensor, state in self.states:
            if state:
                self.optimizer.state[tensor] = state
            else:
                self.optimizer.state.pop(tensor, None)
        groups = self.optimizer.param_groups if wrapper is None else wrapper.param_groups
        for live, names in zip(groups, self.optimizer.compression.names, strict=True):
            options = next((group for group in self.saved.groups if set(group["params"]) & set(names)), {})
            live.update({k: v for k, v in options.items() if k in live and k not in _HERE})
        self.optimizer.compression.errors.update(self.errors)
        self.optimizer.compression.states_replaced()
        warn_of_lossy(self.optimizer, self.encoded)

    def _parameters(self) -> None:
        optimizer = self.optimizer
        for group, names in zip(optimizer.param_groups, optimizer.compression.names, strict=True):
            named = zip(group["params"], names, optimizer.records(group), strict=True)
            for index, (param, fqn, record) in enumerate(named):
                found = self.saved.layers.get(fqn)
                if found is None:
                    self.states.append((param, {}))
                    continue
                self._check_shape(found, global_shape(param))
                if record is None:
                    self.states.append((param, self._kept(found, param, group)))
                else:
                    saved = None if found.layer is None else found.layer.to_record()
                    chosen = LayerRecord.from_record(self.replaced.choose(saved, record, group, index))
                    part = LayerPart(chosen, shard_of(param, fqn))
                    part.check_shape()
                    state = {"step": as_float_tensor(found.step)} | self._part(found, part, param, group)
                    self.states.append((param, state))

    def _flat(self, flat: FlatTensor) -> dict[str, Any]:
        """The state of one of DeepSpeed's flat tensors."""
        found = {segment.fqn: self.saved.layers.get(segment.fqn) for segment in flat.segments}
        present = [layer for layer in found.values() if layer is not None]
        if not present:
            return {}
        state: dict[str, Any] = {"step": as_float_tensor(present[0].step)}
        group = self.saved.group_of(present[0].fqn)
        if not flat.parts:
            kept = self._kept_run(flat, flat.segments, 0, flat.tensor.numel(), "")
            return state | {name: value.view(flat.tensor.shape) for name, value in kept.items()}  # torch's step has it
        for part in flat.parts:
            if part.layer.compressed:
                layer = found[part.layer.fqn]
                if layer is None:
                    state |= part.allocate(flat.tensor, group)
                else:
                    self._check_shape(layer, part.layer.shape)
                    state |= self._part(layer, part, flat.tensor, group)
            else:
                assert part.span is not None
                start, stop = part.span.start, part.span.stop
                inside = [segment for segment in flat.segments if start <= segment.start < stop]
                state |= self._kept_run(flat, inside, start, stop, part.prefix)
        return state

    def _part(self, found: SavedLayer, part: LayerPart, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The states of one part of a compressed layer."""
        tensors: dict[str, Any] = {}
        specs = {state: part.spec(state, param, group) for state in part.layer.persistent_codecs()}
        for state, encoded, error in encode_states(found, self._sources(found), specs, part.layer):
            tensors |= encoded
            if error is None:
                self.errors.setdefault(found.fqn, {})[state] = 1.0  # starts afresh
            elif error != 0:
                self.errors.setdefault(found.fqn, {})[state] = error
                self.encoded.setdefault(found.fqn, {})[state] = error
        return tensors

    def _sources(self, found: SavedLayer) -> dict[str, list[Source]]:
        """A layer's states as they were. The last layer's are remembered: its parts lie side by side."""
        if self._last is None or self._last[0] is not found:
            self._last = found, found.states()
        return self._last[1]

    def _kept(self, found: SavedLayer, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """torch's own state of a kept parameter."""
        saved_group = {**group, **self.saved.group_of(found.fqn)}
        layer = LayerRecord(found.fqn, 0, global_shape(param), self._dense_states(saved_group, param), {})
        part = LayerPart(layer, kept_shard_of(param, found.fqn))
        sources = self._sources(found)
        self._check_complete(found, sources, layer.signed)
        state: dict[str, Any] = {}
        if found.step is not None:
            on_device = bool(group.get("fused") or group.get("capturable"))
            state["step"] = step_tensor(found.step, param.device if on_device else "cpu")
            if "weight_decay" not in group:
                state["step"] = int(found.step)  # SparseAdam counts in a Python int
        for name in layer.signed:
            spec = part.spec(name, param, group)
            held = torch.zeros_like(local(param))
            if name in sources:
                fill_dense(spec, sources[name], part.shard.as_rows(held))
            state[name] = dense_like(param, held)
        return state

    def _kept_run(self, flat: FlatTensor, segments: Any, start: int, stop: int, prefix: str) -> dict[str, Any]:
        """Dense states of kept elements ``[start, stop)`` of a flat tensor."""
        every = [self.saved.layers.get(segment.fqn) for segment in (*segments, *flat.segments)]
        first = next((layer for layer in every if layer is not None), None)
        if first is None:
            return {}
        names = self._dense_states(self.saved.group_of(first.fqn), flat.tensor)
        state = {name: torch.zeros(stop - start, dtype=flat.tensor.dtype, device=flat.tensor.device) for name in names}
        for segment in segments:
            found = self.saved.layers.get(segment.fqn)
            if found is not None:
                self._check_shape(found, segment.shape)
                self._fill(state, found, segment, start, flat.tensor)
        return {prefix + name: value for name, value in state.items()}

    def _fill(
        self, state: dict[str, Tensor], found: SavedLayer, segment: NamedSegment, origin: int, param: Tensor
    ) -> None:
        sources, group = self._sources(found), self.saved.group_of(found.fqn)
        signed = self._dense_states(group, param)
        self._check_complete(found, sources, signed)
        for part in layer_parts(LayerRecord(found.fqn, 0, found.shape, signed, {}), segment):
            assert part.span is not None
            start, stop = part.span.start - origin, part.span.stop - origin
            for name, flat in state.items():
                if name in sources:
                    spec = dataclasses.replace(part, prefix="").spec(name, param, group)
                    fill_dense(spec, sources[name], part.shard.as_rows(flat[start:stop]))

    def _dense_states(self, group: Mapping[str, Any], param: Tensor) -> dict[str, bool]:
        """The states that torch keeps of a parameter, and whether each may be negative."""
        return {state.name: state.signed for state in self.optimizer.rule.kept_states(group, param)}

    def _check_complete(self, found: SavedLayer, sources: Mapping[str, Any], states: Mapping[str, bool]) -> None:
        if missing := [state for state in states if state not in sources and not found.dropped(state)]:
            raise found.lacks(missing, sources)

    def _check_shape(self, found: SavedLayer, shape: tuple[int, ...]) -> None:
        if found.shape != shape:
            raise ValueError(f"{found.fqn} has shape {list(found.shape)} in the checkpoint, {list(shape)} here")
