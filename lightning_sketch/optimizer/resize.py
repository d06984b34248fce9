"""`resize_states`: follow a model whose tables were given more rows, or fewer, in the middle of training."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_sketch.codecs import Codec, Rows, StateSpec, encode, key_of, relative_error
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.lossy import warn_of_lossy
from lightning_sketch.optimizer.stock import StockOptimizer
from lightning_sketch.policy.plan import make_plan
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import Block, Shard, is_dtensor

OptimizerT = TypeVar("OptimizerT")


def resize_states(optimizer: OptimizerT, model: nn.Module) -> OptimizerT:
    """Have a converted optimizer follow its model after rows were added to, or cut off, some of its parameters.

    Call it after ``model.resize_token_embeddings(n)``, or anything else that replaced parameters by others of the same
    name, or their data. Rows that stay keep their states: as they are where a codec keeps a number for every element,
    up to rounding with `RowWise`, `Factored` and `SM3`, and encoded anew in a sketch of the new size. New rows start
    with none, which in a sketch is what they share with others. The step count stays. Of parameters that were resized,
    gradients are set to None. Layers without compression are treated in the same way.

    Under DDP every rank calls it, and the model is wrapped anew after it was resized, as without lightning_sketch.

    Args:
        optimizer: a converted optimizer, or a trainer's wrapper around one.
        model: the model that `compress` was given, resized.

    Returns:
        `optimizer`, the same object: schedulers and wrappers stay valid.

    Raises:
        TypeError: the optimizer is not converted, or has no update rule of ours.
        ValueError: a parameter is gone from the model, has changed in more than its number of rows, is sharded, or the
            policy decides the resized layer otherwise. Nothing was changed then.

    >>> import torch
    >>> from lightning_sketch import Policy, Rule, compress, resize_states
    >>> model = torch.nn.Embedding(30, 4)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> policy = Policy([Rule(role="embedding", exp_avg="BFloat16", exp_avg_sq="RowWise")])
    >>> optimizer = compress(optimizer, model, policy)
    >>> model(torch.arange(4)).sum().backward(); optimizer.step()
    >>> model.weight = torch.nn.Parameter(torch.cat([model.weight.data, torch.zeros(2, 4)]))
    >>> resize_states(optimizer, model).state[model.weight]["exp_avg"].shape
    torch.Size([32, 4])
    """
    inner = unwrap(optimizer)
    if not isinstance(inner, CompressedOptimizer):
        raise TypeError(f"resize_states() needs a converted optimizer, got {type(inner).__name__}")
    if isinstance(inner, StockOptimizer):
        raise TypeError(
            f"resize_states() cannot resize the states of {inner.stock.__name__}, which has no update rule of ours: "
            "what it keeps beside them only its own step knows. Make a new optimizer of the resized model"
        )
    changes = list(_changes(inner, model))
    _check_decisions(inner, model, changes)
    made = [_new_state(change, inner.state.get(change.old, {})) for change in changes]

    compression = inner.compression
    compression.model = weakref.ref(model)
    errors: dict[str, dict[str, float]] = {}
    for change, (state, error) in zip(changes, made, strict=True):
        inner.state.pop(change.old, None)
        change.group["params"][change.index] = change.new
        change.new.grad = None
        if state:
            inner.state[change.new] = state
        if change.layer is not None:
            compression.replace_record(change.group, change.index, change.resized().to_record())
            errors[change.fqn] = error
    compression.errors.update(errors)
    inner.compression.bindings.clear()
    compression.states_replaced([change.fqn for change in changes])
    warn_of_lossy(inner, errors)
    return optimizer


@dataclass(frozen=True)
class _Change:
    """A parameter of the optimizer that is another one in the model now, or of another shape.

    Args:
        group, index: its place in the optimizer.
        fqn: its name.
        layer: what was decided for it; ``None`` if it is not compressed.
        old: the parameter that the optimizer holds.
        new: the model's; may be the same object with other data.
        old_shape: the shape that its states are of.
    """

    group: dict[str, Any]
    index: int
    fqn: str
    layer: LayerRecord | None
    old: Tensor
    new: Tensor
    old_shape: tuple[int, ...]

    def resized(self) -> LayerRecord:
        assert self.layer is not None
        return replace(self.layer, shape=tuple(self.new.shape))


def _changes(optimizer: CompressedOptimizer, model: nn.Module) -> Iterator[_Change]:
    layers = named_layers(model).values()
    by_name = {name: layer.param for layer in layers for name in layer.names}
    seen: set[int] = set()
    for group, names in zip(optimizer.param_groups, optimizer.compression.names, strict=True):
        if optimizer.is_flat(group) or len(names) != len(group["params"]):
            raise ValueError(
                "the optimizer's groups are not those that were compressed: an engine or a trainer replaced their "
                "parameters. Resize the model before, and compress the optimizer after"
            )
        for index, (fqn, old, record) in enumerate(zip(names, group["params"], optimizer.records(group), strict=True)):
            if record is None and not isinstance(old, nn.Parameter):
                continue  # a plain tensor beside the model's parameters
            new = by_name.get(fqn)
            if new is None:
                raise ValueError(
                    f"{fqn} is no parameter of the model; give resize_states the model that was compressed"
                )
            if id(new) in seen:
                raise ValueError(f"{fqn} is tied now to another parameter of the optimizer; compress a new optimizer")
            seen.add(id(new))
            layer = None if record is None else LayerRecord.from_record(record)
            old_shape = layer.shape if layer is not None else _shape_of_states(old, optimizer.state.get(old, {}))
            if new is old and tuple(new.shape) == old_shape:
                continue
            if is_dtensor(new) or is_dtensor(old):
                raise ValueError(f"{fqn} is sharded (DTensor): resize the model before fully_shard, and compress after")
            if not old_shape or tuple(new.shape)[1:] != old_shape[1:] or new.ndim != len(old_shape):
                raise ValueError(
                    f"{fqn} was of shape {list(old_shape)} and now is {list(new.shape)}: rows can be added or cut off, "
                    "and nothing else; compress an optimizer of the new parameters"
                )
            yield _Change(group, index, fqn, layer, old, new, old_shape)


def _shape_of_states(param: Tensor, state: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape that an uncompressed parameter had when its states were made."""
    shapes = (tuple(value.shape) for key, value in state.items() if key != "step" and isinstance(value, Tensor))
    return next(shapes, tuple(param.shape))


def _check_decisions(optimizer: CompressedOptimizer, model: nn.Module, changes: list[_Change]) -> None:
    """A policy that decides otherwise about the new shape would refuse this optimizer's checkpoints later."""
    policy = optimizer.compression.policy
    if policy is None:  # the optimizer was unpickled
        return
    for change in changes:
        planned = make_plan(model, [change.group | {"params": [change.new]}], optimizer.rule, policy).layers[0]
        decided = planned.layer.codecs if planned.layer.compressed else None
        if decided != (None if change.layer is None else change.layer.as_decided().codecs):
            now = "leaves it uncompressed" if decided is None else f"gives it {dict(decided)}"
            raise ValueError(
                f"{change.fqn}: at {change.new.shape[0]:,} rows instead of {change.old_shape[0]:,} the policy {now}; "
                "use a policy whose min_rows and min_numel decide alike before and after"
            )


def _new_state(change: _Change, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The ``optimizer.state`` of the resized parameter, and the relative error of what was encoded anew."""
    if not state:
        return {}, {}
    if change.layer is None:
        return {key: _resized_like(value, change) for key, value in state.items()}, {}
    old = LayerPart(change.layer, Shard.whole(change.old_shape))
    new = LayerPart(change.resized(), Shard.whole(tuple(change.new.shape)))
    tensors: dict[str, Any] = {"step": state["step"]}
    errors: dict[str, float] = {}
    for name, codec in change.layer.persistent_codecs().items():
        before, after = (part.spec(name, change.new, change.group) for part in (old, new))
        if kept := _table_of_same_size(codec, after, state):
            tensors |= kept
            continue
        rows = _rows(codec, before, state, after)
        tensors |= encode(codec, after, rows)
        for suffix, axes in codec.axes(len(change.old_shape)).items():
            if axes == tuple(range(len(change.old_shape))):  # a number for every element
                _copy_rows(state[key_of(name, suffix)], tensors[key_of(name, suffix)])
        errors[name] = relative_error(codec, after, tensors, rows)
    return tensors, errors


def _table_of_same_size(codec: Codec, after: StateSpec, state: Mapping[str, Any]) -> dict[str, Any]:
    """A sketch with as many buckets for the new rows as for the old ones stays as it is; otherwise nothing."""
    meta = codec.allocate(replace(after, device=torch.device("meta")))
    old = {key_of(after.name, suffix): state[key_of(after.name, suffix)] for suffix in meta}
    expected = (x.shape for x in meta.values() if isinstance(x, Tensor))
    found = (x.shape for x in old.values() if isinstance(x, Tensor))
    return old if list(expected) == list(found) else {}


def _rows(codec: Codec, before: StateSpec, state: Mapping[str, Any], after: StateSpec) -> Rows:
    """What the old state says of every row of the new one."""
    old = before.shard
    bound = codec.bind(before, dict(state))

    def rows(block: Block) -> Tensor:
        assert isinstance(block.index, slice)
        values = torch.full((block.size, *old.row_shape), after.fill, dtype=after.dtype, device=after.device)
        start = block.index.start
        if (count := min(block.size, old.local_rows - start)) > 0:
            values[:count] = bound.estimate(Block(old, slice(start, start + count), slice(0, count)))
        return values

    return rows


def _resized_like(value: Any, change: _Change) -> Any:
    """A state as torch keeps it."""
    if not isinstance(value, Tensor) or tuple(value.shape) != change.old_shape:
        return value
    fill = float(change.group.get("initial_accumulator_value", 0.0))
    new = torch.full_like(change.new, fill, dtype=value.dtype, device=value.device, requires_grad=False)
    _copy_rows(value, new)
    return new


def _copy_rows(old: Tensor, new: Tensor) -> None:
    count = min(len(old), len(new))
    new[:count] = old[:count]
