"""`reset_states`: states as they are before the first step, of all layers or of some."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.layers.flat import FlatTensor
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.layers.roles import check_pattern, matches_name
from lightning_sketch.layers.transcode import fresh_state
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding.wrapper import wrapper_of


def reset_states(optimizer: Any, layers: str | Sequence[str] | None = None) -> list[str]:
    """Forget the states of layers, step counts included: they train on as from their first step.

    As ReLoRA does when it merges its adapters, and whoever restarts moments with a learning rate. Parameters and
    hyperparameters stay. Compressed and kept layers alike; Adagrad's sum is its ``initial_accumulator_value`` again.
    Of sharded parameters each rank resets its own shards, so every rank calls it.

    Args:
        optimizer: a converted optimizer, a trainer's wrapper of one, or a DeepSpeed engine that trains with one.
        layers: names of parameters, or patterns as in `Rule`: fnmatch, or ``"re:..."`` to search a regular expression;
            ``None`` for all.

    Returns:
        names of the layers that were reset.

    Raises:
        TypeError: the optimizer is not a converted one.
        ValueError: a name or pattern matches no parameter of the optimizer, or layers share a flat tensor of DeepSpeed,
            and with it a step count, with layers that are not to be reset. Nothing was changed then.

    >>> import torch
    >>> from lightning_sketch import Policy, Rule, compress, reset_states
    >>> model = torch.nn.Embedding(30_000, 16)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> optimizer = compress(optimizer, model, Policy([Rule(role="embedding", second_moment="RowWise")]))
    >>> reset_states(optimizer, "weight")
    ['weight']
    """
    wrapper, inner = wrapper_of(optimizer), unwrap(optimizer)
    if not isinstance(inner, CompressedOptimizer):
        raise TypeError(
            f"reset_states() needs a converted optimizer, got {type(inner).__name__}; of a plain one, "
            "optimizer.state.clear() forgets all states"
        )
    if wrapper is not None:
        inner.bind(wrapper)
    names = [fqn for group in inner.compression.names for fqn in group]
    chosen = set(names if layers is None else _matching([layers] if isinstance(layers, str) else layers, names))
    for flat in _whole_flat_tensors(inner, chosen):
        _forget(inner, inner.flat_group(flat), flat.tensor, None)
    for group, group_names in zip(inner.param_groups, inner.compression.names, strict=True):
        if not inner.is_flat(group) and group["params"]:
            for param, fqn, record in zip(group["params"], group_names, inner.records(group), strict=True):
                if fqn in chosen:
                    _forget(inner, group, param, record)
    inner.compression.states_replaced(chosen)
    return [fqn for fqn in names if fqn in chosen]


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that any of the patterns matches; each must match one."""
    found: list[str] = []
    for pattern in patterns:
        check_pattern(pattern)
        matched = [fqn for fqn in names if fqn == pattern or matches_name(pattern, fqn)]
        if not matched:
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            raise ValueError(
                f"{pattern!r} matches no parameter of the optimizer; the nearest is {', '.join(map(repr, nearest))}"
            )
        found += matched
    return found


def _whole_flat_tensors(optimizer: CompressedOptimizer, chosen: set[str]) -> list[FlatTensor]:
    """DeepSpeed's flat tensors that hold chosen layers."""
    found = [flat for flat in optimizer.compression.flat or () if chosen & set(flat.names_on_any_rank)]
    for flat in found:
        if others := [fqn for fqn in flat.names_on_any_rank if fqn not in chosen]:
            here = ", ".join(sorted(chosen & set(flat.names_on_any_rank)))
            raise ValueError(
                f"{here} cannot be reset without {', '.join(others)}: DeepSpeed keeps them in one flat tensor, which "
                "has one step count. Reset them all, or give the layers a parameter group of their own"
            )
    return found


def _forget(optimizer: CompressedOptimizer, group: Mapping[str, Any], tensor: Tensor, record: str | None) -> None:
    """Drop the state of a tensor: the next step allocates another, but for Adagrad's, which is made anew here.

    Args:
        record: of the compressed layer that `tensor` is; ``None`` for a kept one or a flat tensor.
    """
    state = optimizer.state.pop(tensor, None)
    if "initial_accumulator_value" not in group or not state:
        return
    if record is not None:
        optimizer.state[tensor] = fresh_state(LayerRecord.from_record(record), tensor, group)
    elif "sum" in state:
        step, fill = state["step"], float(group["initial_accumulator_value"])
        fresh = {"step": torch.zeros_like(step), "sum": torch.full_like(state["sum"], fill)}
        optimizer.state[tensor] = fresh
