"""What a converted optimizer puts into a state dict, and what it takes from one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.layers import dtensor_states
from lightning_sketch.layers.flat import FlatTensor
from lightning_sketch.layers.record import RECORDS, LayerPart, LayerRecord, part_of
from lightning_sketch.layers.reshard import reshard
from lightning_sketch.layers.step_count import read_step, step_tensor
from lightning_sketch.layers.stock_states import unnested
from lightning_sketch.layers.transcode import encode_layer, encode_parts
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.optimizer.lossy import warn_of_lossy
from lightning_sketch.optimizer.recode import ReplacedRecords
from lightning_sketch.policy.recorded import policy_hint
from lightning_sketch.sharding import is_dtensor, local, shard_of
from lightning_sketch.sharding.agree import Places, place, raise_together
from lightning_sketch.sharding.dtensor import ranks_of
from lightning_sketch.sharding.fake import is_fake

#: In a flat tensor's entry of a checkpoint: its segments.
LAYOUT = "layout"
#: Beside it where ranks agreed on the states that they share, which files of older versions do not say.
AGREED = "agreed"


def finish_state_dict(optimizer: CompressedGroups, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Make torch's state dict of a converted optimizer fit for checkpoints of sharded parameters."""
    state, index = dict(state_dict["state"]), 0
    divided = optimizer.compression.flat is not None and bool(optimizer.compression.flat.ranks)
    agreed = {AGREED: 1} if divided else {}
    for group in optimizer.param_groups:
        flat = optimizer.is_flat(group)
        records = [None] * len(group["params"]) if flat or not group["params"] else optimizer.records(group)
        for record, param in zip(records, group["params"], strict=True):
            if index in state and flat:
                held = optimizer.flat_tensor(param)
                state[index] = dict(state[index]) | {LAYOUT: held.to_list()} | agreed
            elif index in state and record is not None:
                part = part_of(record, param)
                if part.layer.stock_count is not None:
                    state[index] = unnested(part.layer, state[index])
                state[index] = dtensor_states.wrap(part, param, state[index]) if is_dtensor(param) else state[index]
            index += 1
    return {**state_dict, "state": state}


def prepare_load(
    optimizer: CompressedGroups, state_dict: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[Tensor, dict[str, Any]]]]:
    """Check a checkpoint against the live optimizer and split it; changes nothing but the report of encoding errors.

    Args:
        optimizer: the optimizer that will load.
        state_dict: from `CompressedGroups.state_dict` or from the uncompressed optimizer's.

    Returns:
        the part that torch loads, and ``(param, optimizer.state[param])`` for every tensor that our rules step.

    Raises:
        ValueError: the checkpoint does not fit; the message names every layer and the reason. Or a live parameter was
            resized.
    """
    saved_groups = state_dict["param_groups"]
    live_groups = optimizer.param_groups
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in live_groups]:
        raise ValueError(
            f"the checkpoint has parameter groups of {[len(g['params']) for g in saved_groups]} parameters, "
            f"the optimizer of {[len(g['params']) for g in live_groups]}; if another engine wrote it, load it with "
            "lightning_sketch.restore"
        )
    load = _Load(optimizer, dict(state_dict["state"]))
    for saved, live in zip(saved_groups, live_groups, strict=True):
        if optimizer.is_flat(live):
            load.flat_group(saved, live)
        elif live["params"]:
            load.group(saved, live)
    problem = None
    if load.problems:
        problem = ValueError(
            "this checkpoint does not fit the compressed optimizer; nothing was changed.\n  "
            + "\n  ".join(load.problems)
            + "\nLoad it with the policy and seed it was written under; with lightning_sketch.restore, if another "
            "engine, number of ranks or order of parameters wrote it; or make it dense first with "
            "lightning_sketch.decompress_state_dict(state_dict)." + _policy_hint(optimizer, saved_groups)
        )
    raise_together(problem, load.divided, "the checkpoint")
    optimizer.compression.errors.update(load.errors)
    warn_of_lossy(optimizer, load.errors)
    # The live policy stays: a dense checkpoint must not switch compression off.
    load.replaced.put(optimizer.compression)
    groups = [
        {**saved, RECORDS: live[RECORDS]} if RECORDS in live else saved
        for saved, live in zip(saved_groups, live_groups, strict=True)
    ]
    return {**state_dict, "state": load.stock_state, "param_groups": groups}, load.restored


class _Load:
    """A checkpoint on its way into an optimizer."""

    def __init__(self, optimizer: CompressedGroups, stock_state: dict[Any, Any]) -> None:
        self.optimizer = optimizer
        self.stock_state = stock_state  # what torch will load
        self.restored: list[tuple[Tensor, dict[str, Any]]] = []
        self.problems: list[str] = []
        self.errors: dict[str, dict[str, float]] = {}
        #: Ranks among which layers with dense states are divided: they encode them together, and refuse together.
        self.divided: Places = {}
        self.replaced = ReplacedRecords()

    def group(self, saved: Mapping[str, Any], live: dict[str, Any]) -> None:
        """A group of parameters, whole or DTensors."""
        records = saved.get(RECORDS) or [None] * len(saved["params"])
        for index, (key, record, live_record, param) in enumerate(
            zip(saved["params"], records, self.optimizer.records(live), live["params"], strict=True)
        ):
            state = self.stock_state.get(key)
            if live_record is None:
                if record is not None:
                    self.problems.append(f"{_fqn_of(record)}: compressed in the checkpoint, kept by the policy")
                elif state and is_dtensor(param):
                    self.stock_state[key] = {k: dtensor_states.sharded_like(param, v) for k, v in state.items()}
                continue
            live_record = self.replaced.choose(record, live_record, live, index)
            layer = LayerRecord.from_record(live_record)
            part_of(live_record, param).check_shape()
            if layer.stock_count is not None and state:
                state = unnested(layer, state)
            problem = _mismatch(record, live_record) if record is not None else _not_dense(layer, param, state)
            problem = problem or self._refused_options(layer, {**live, **saved})
            if problem or not state:
                self.problems += [f"{layer.fqn}: {problem}"] if problem else []
                continue
            if layer.stock_count is None and (state := self._with_step(state, layer.fqn)) is None:
                continue
            if record is None:
                if is_dtensor(param) and not is_fake(param):
                    self.divided |= place(ranks_of(param, layer.fqn), local(param).device)
                try:
                    tensors, self.errors[layer.fqn] = encode_layer(layer, param, live, state)
                except ValueError as error:
                    self.problems.append(str(error))
                    continue
            else:
                found = self._layer_state(layer, param, live, state)
                if isinstance(found, str):
                    self.problems.append(f"{layer.fqn}: {found}")
                    continue
                tensors = found
            self._restore(key, param, tensors)
            if layer.stock_count is not None:  # a stock __setstate__ may want entries that torch is not to cast
                del self.stock_state[key]

    def _with_step(self, state: Mapping[str, Any], owner: str) -> dict[str, Any] | None:
        """An entry whose step count, in whatever form, is a tensor as live ones are; ``None`` if it is no count."""
        try:
            counted = {"step": step_tensor(read_step(state["step"], owner))} if "step" in state else {}
        except ValueError as error:
            self.problems.append(str(error))
            return None
        return {**state, **counted}

    def _refused_options(self, layer: LayerRecord, group: Mapping[str, Any]) -> str | None:
        """Why the layer could not be trained with the checkpoint's hyperparameters."""
        try:
            self.optimizer.rule.check(group, layer.fqn)
        except ValueError as error:
            return str(error)
        lacking = layer.lacking(self.optimizer.rule, group)
        return f"the checkpoint's hyperparameters ask for {', '.join(lacking)}" if lacking else None

    def flat_group(self, saved: Mapping[str, Any], live: dict[str, Any]) -> None:
        """A group of flat tensors. They load where the layout is the same, as DeepSpeed's own checkpoints do."""
        for record, live_record in zip(saved.get(RECORDS, ()), live.get(RECORDS, ()), strict=False):
            if record is not None and live_record is None:
                self.problems.append(f"{_fqn_of(record)}: compressed in the checkpoint, kept by the policy")
            elif live_record is not None and (problem := _mismatch(record, live_record)):
                self.problems.append(f"{_fqn_of(live_record)}: {problem}")
        for key, param in zip(saved["params"], live["params"], strict=True):
            flat, state = self.optimizer.flat_tensor(param), self.stock_state.get(key)
            if not state:
                continue
            layout = state.get(LAYOUT)
            own = {k: v for k, v in state.items() if k not in (LAYOUT, AGREED)}
            if flat.parts:
                counted = self._with_step(own, f"flat tensor {key}")
                if counted is None:
                    continue
                own = counted
            if layout is not None and [list(segment) for segment in layout] != flat.to_list():
                self.problems.append(
                    f"flat tensor {key}: the checkpoint was written with another layout (world size, ZeRO stage or "
                    "parameter groups); load it with lightning_sketch.restore(engine, directory)"
                )
            elif layout is not None and flat.shared and AGREED not in state:
                self.problems.append(
                    f"flat tensor {key}: the checkpoint was written by a version under which each rank kept states of "
                    "its own; load it with lightning_sketch.restore(engine, directory), which converts it"
                )
            elif not flat.parts:
                self.stock_state[key] = own
            elif layout is not None:
                loaded = _checked(self._expected_flat(flat, live), flat.parts, own, param.device)
                if isinstance(loaded, str):
                    self.problems.append(f"flat tensor {key}: {loaded}")
                else:
                    self._restore(key, param, loaded)
            else:
                self._encode_flat(key, flat, live, own)

    def _layer_state(
        self, layer: LayerRecord, param: Tensor, group: Mapping[str, Any], state: Any
    ) -> dict[str, Any] | str:
        """The live form of a compressed layer's entry, or what is wrong with it."""
        if problem := dtensor_states.step_mismatch(state):
            return problem
        part = LayerPart(layer, shard_of(param, layer.fqn))
        if layer.stock_count is not None:
            return self._stock_state(part, param, group, state)
        expected: dict[str, Any] = {"step": step_tensor()}
        expected |= part.allocate(torch.empty_like(local(param), device="meta"), group)
        same = dtensor_states.unwrap_same(part, param, state)
        if same is not None:
            # A wrapper may keep entries of its own there (Lookahead its slow weights), which torch carries, too.
            own = {k: v for k, v in same.items() if k in expected or str(k).startswith(tuple(layer.codecs))}
            held = _checked(expected, [part], own, param.device)
            others = {k: v.clone() if isinstance(v, Tensor) else v for k, v in same.items() if k not in own}
            return held if isinstance(held, str) else held | others
        lacking = sorted(key for key in expected if key not in state)
        if lacking:
            return f"holds {sorted(map(str, state))}, lacks {lacking}"
        tensors: dict[str, Any] = {"step": state["step"]}
        for name, codec in layer.persistent_codecs().items():
            try:
                found = list(dtensor_states.sources(layer, name, codec, state, part.shard))
                encoded, relative = reshard(codec, part.spec(name, param, group), found)
            except (ValueError, RuntimeError, IndexError) as error:
                return f"cannot be moved to this layout: {error}"
            tensors |= encoded
            self.errors.setdefault(layer.fqn, {})[name] = relative
        return tensors

    def _stock_state(
        self, part: LayerPart, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
    ) -> dict[str, Any] | str:
        """`_layer_state` of a layer that its optimizer's own step updates: it may keep anything beside our tensors."""
        layer, errors = part.layer, self.errors.setdefault(part.layer.fqn, {})
        same = dtensor_states.unwrap_same(part, param, state)
        loaded = dtensor_states.of_others(layer, state) if same is None else dict(same)
        for name, codec in layer.codecs.items():
            expected = part.layout(param)[name]
            saved = state if same is None else same
            if not set(expected) & set(saved):
                continue  # not made yet
            if isinstance(own := saved.get(name), Tensor) and not own.is_floating_point():
                continue  # its optimizer's codes, which are left to it
            if same is not None:
                held = _checked(expected, [part], {key: same[key] for key in expected if key in same}, param.device)
            else:
                try:
                    found = list(dtensor_states.sources(layer, name, codec, state, part.shard))
                    held, errors[name] = reshard(codec, part.spec(name, param, group), found)
                except (ValueError, RuntimeError, IndexError, KeyError) as error:
                    return f"cannot be moved to this layout: {error}"
            if isinstance(held, str):
                return held
            loaded |= held
        keys = dtensor_states.tensor_axes(layer)
        for key, value in loaded.items():
            if key not in keys and isinstance(value, Tensor):
                loaded[key] = value.to(param.device, copy=True) if value.ndim else value.clone()
        return loaded

    def _expected_flat(self, flat: FlatTensor, group: Mapping[str, Any]) -> dict[str, Any]:
        expected: dict[str, Any] = {"step": step_tensor()}
        meta = flat.tensor.to("meta")
        for part in flat.parts:
            expected |= part.allocate(meta, group)
        return expected

    def _encode_flat(self, key: Any, flat: FlatTensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        tensors: dict[str, Any] = {"step": state.get("step", step_tensor(1.0))}
        dense: list[dict[str, Tensor]] = []
        for part in flat.parts:
            missing = [n for n in part.layer.codecs if getattr(state.get(n), "shape", None) != flat.tensor.shape]
            if missing:
                self.problems.append(f"{part.layer.fqn}: the checkpoint has no dense {', '.join(missing)} of its shape")
                return
            dense.append({name: part.rows(state[name]) for name in part.layer.codecs})
        ranks = () if self.optimizer.compression.flat is None else self.optimizer.compression.flat.ranks
        found = encode_parts(flat.parts, flat.tensor, group, dense, flat.shared, ranks)
        for part, (encoded, errors) in zip(flat.parts, found, strict=True):
            tensors |= encoded
            if part.layer.compressed:
                self.errors[part.prefix.removesuffix(".")] = errors
        self._restore(key, flat.tensor, tensors)

    def _restore(self, key: Any, param: Tensor, tensors: dict[str, Any]) -> None:
        self.restored.append((param, tensors))
        self.stock_state[key] = {"step": tensors.get("step", step_tensor())}  # torch's __setstate__ wants one


def _policy_hint(optimizer: CompressedGroups, saved_groups: Iterable[Mapping[str, Any]]) -> str:
    policy = optimizer.compression.policy
    live = _recorded_layers(optimizer.param_groups)
    return policy_hint(_recorded_layers(saved_groups), live, None if policy is None else policy.seed)


def _recorded_layers(groups: Iterable[Mapping[str, Any]]) -> Iterator[LayerRecord]:
    """The compressed layers of parameter groups whose records can be read."""
    for group in groups:
        for record in group.get(RECORDS) or ():
            try:
                if record is not None:
                    yield LayerRecord.from_record(record).as_decided()
            except ValueError:  # another format version: named among the problems
                continue


def _mismatch(saved: str | None, live: str) -> str | None:
    """Why a saved layer record does not fit the live one."""
    if saved == live:
        return None
    if saved is None:
        return "kept in the checkpoint, compressed by the policy"
    try:
        return LayerRecord.from_record(saved).difference(LayerRecord.from_record(live))
    except ValueError as error:
        return str(error)


def _fqn_of(record: str) -> str:
    try:
        return LayerRecord.from_record(record).fqn
    except ValueError as error:
        return str(error)


def _damage(expected: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """What is missing from, or wrong with, a saved compressed state."""
    if set(state) != set(expected):
        return f"holds {sorted(map(str, state))}, expected {sorted(expected)}"
    for key, value in expected.items():
        if isinstance(value, Tensor):
            found = state[key]
            if not isinstance(found, Tensor) or found.shape != value.shape or found.dtype != value.dtype:
                return f"{key} is {_describe(found)}, expected {_describe(value)}"
    return None


def _not_dense(layer: LayerRecord, param: Tensor, state: Any) -> str | None:
    """Why a saved uncompressed state cannot be encoded."""
    if not state:
        return None
    found = layer.codecs
    if layer.stock_count is not None:  # its optimizer may make some later
        found = {name: codec for name, codec in found.items() if name in state} or found
    for name in found:
        if not isinstance(state.get(name), Tensor):
            return f"has no {name} in the checkpoint (it holds {sorted(map(str, state))})"
        if state[name].shape != param.shape:
            return f"{name} has shape {list(state[name].shape)} in the checkpoint, the parameter {list(param.shape)}"
    return None


def _checked(
    expected: Mapping[str, Any], parts: Sequence[LayerPart], state: dict[str, Any], device: torch.device
) -> dict[str, Any] | str:
    """A saved compressed state as the live optimizer holds it, or what is wrong with it."""
    try:
        for part in parts:
            state = state | part.scales(state)
    except ValueError as error:
        return str(error)
    if problem := _damage(expected, state):
        return problem
    # Copies: the checkpoint stays the caller's. `step` and scales live on the CPU, where reading them costs nothing.
    return {k: v.to("cpu" if expected[k].is_cpu else device, copy=True) for k, v in state.items()}


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
