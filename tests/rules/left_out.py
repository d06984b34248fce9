"""One part of a layer under any rule, codecs and layout, stepped by `rules.run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from lightning_sketch import Codec, kernels
from lightning_sketch.codecs.decay import ScaledState
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.optimizer.bound import BoundPart
from lightning_sketch.rules import (
    AdagradRule,
    AdamRule,
    AdamWRule,
    RMSpropRule,
    SGDRule,
    SparseAdamRule,
    UpdateRule,
    run,
)
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.gradient import RowGradient
from tests.tiny import assert_same

RULES: dict[str, tuple[UpdateRule, type[Optimizer], dict[str, Any]]] = {
    "adam": (AdamRule(), Adam, {"weight_decay": 0.1, "maximize": True}),
    "adamw": (AdamWRule(), AdamW, {"weight_decay": 0.1}),
    "sparse_adam": (SparseAdamRule(), SparseAdam, {}),
    "adagrad": (AdagradRule(), Adagrad, {"weight_decay": 0.01, "initial_accumulator_value": 0.1}),
    "rmsprop": (RMSpropRule(), RMSprop, {}),
    "rmsprop, momentum": (RMSpropRule(), RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd": (SGDRule(), SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGDRule(), SGD, {"momentum": 0.9, "nesterov": True}),
}

SHARDS = {
    "whole": Shard.whole((40, 6)),
    "row shard": Shard((90, 6), 37, 40, even_rows=45),
    "column shard": Shard((40, 18), 0, 40, part_shape=(6,), column_offset=6),
    "a row cut by ZeRO": Shard((90, 18), 51, 1, part_shape=(7,), column_offset=11),
    "vector": Shard.whole((40,)),
}


@dataclass
class Part:
    """What is trained.

    Args:
        tensors: the states, as ``optimizer.state[param]`` holds them.
    """

    rule: UpdateRule
    group: dict[str, Any]
    part: LayerPart
    bound: BoundPart
    tensors: dict[str, Any]
    steps: int = 0
    fused: bool = False

    @property
    def shard(self) -> Shard:
        return self.part.shard

    @classmethod
    def make(
        cls, rule: str, first: Codec | None, second: Codec, shard: Shard, dtype: torch.dtype = torch.float32
    ) -> Part:
        """A part with random parameters; signed states have `first` (`second` where it is ``None``)."""
        found, stock, options = RULES[rule]
        param = torch.randn(shard.local_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        group = stock([torch.zeros(1)], lr=0.1, **options).param_groups[0]  # type: ignore[call-arg]
        codecs = {state.name: (first or second) if state.signed else second for state in found.states(group)}
        signed = {state.name: state.signed for state in found.states(group)}
        part = LayerPart(LayerRecord("table", 7, shard.global_shape, signed, codecs), shard)
        tensors = part.allocate(param, group)
        return cls(found, group, part, BoundPart.bind(part, param, group, tensors), tensors)

    def step(self, values: Tensor, rows: Tensor | None = None, *, leave_out: bool = True) -> int:
        """One step; how much it left out."""
        self.steps += 1
        numbers = self.rule.numbers(self.group, self.steps)
        maximize = bool(self.group["maximize"])
        gradient = RowGradient(self.shard, rows, values)
        layer = self.bound.step(gradient, numbers, self.steps, maximize=maximize, leave_out=leave_out)
        kernel = kernels.fused_kernel(layer.param.device)
        self.fused = kernel is not None and layer.fusable() and self.rule.fusable(layer.states)
        counts = run(self.rule, [layer])
        return 0 if counts is None else int(counts)

    def load(self, saved: dict[str, Tensor], steps: int | None = None) -> None:
        """Go on from a `snapshot`, which is not copied."""
        param = saved.pop("param")
        self.tensors, self.steps = saved, self.steps if steps is None else steps
        self.bound = BoundPart.bind(self.part, param, self.group, saved)

    @property
    def same_order(self) -> bool:
        """Whether steps of all rows and of their ids compute in the same order. So do fused kernels (of few rows)."""
        states = self.bound.states.values()
        summed = any(
            isinstance(state, ScaledState) and (state.elementwise or hasattr(state, "col")) for state in states
        )
        return not summed or self.fused

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the parameter and all states."""
        return {"param": self.bound.param.clone()} | {key: x.clone() for key, x in self.tensors.items()}

    def elementwise(self) -> dict[str, Tensor]:
        """Parameter and states that are stored by element, each as rows."""
        found = {"param": self.bound.param}
        for name, state in self.bound.states.items():
            if state.elementwise:
                key = name if name in self.tensors else f"{name}_table"
                found[key] = self.tensors[key].view(-1, *self.shard.row_shape)[: self.shard.local_rows]
        return found


def values_like(shard: Shard, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A finite gradient of all rows."""
    return torch.randn(shard.local_shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spoil(values: Tensor) -> list[Tensor]:
    """The gradient with one NaN, with an infinity at both ends, with a whole row of NaN, and of nothing else."""
    rows = len(values)
    one, ends, row = (values.clone() for _ in range(3))
    one.view(rows, -1)[rows // 2, 0] = torch.nan
    ends.view(-1)[0], ends.view(-1)[-1] = torch.inf, -torch.inf
    row[rows // 3] = torch.nan
    return [one, ends, row, torch.full_like(values, torch.nan)]


def check(make: Callable[[], Part], given: Iterable[Tensor], rows: Tensor | None = None) -> None:
    """Steps of gradients that are not finite, and of others between them, are steps without what is not finite.

    Args:
        given: of all rows, or of `rows`.
        rows: local ids, int64 ``[k]``.
    """
    found, expected = make(), make()
    shard, by_element = found.shard, found.bound.unit[1]
    for number, values in enumerate(given):
        finite = values_like(shard, number, values.dtype)
        assert found.step(finite) == expected.step(finite, leave_out=False) == 0
        spoiled = values.isfinite().logical_not()
        bad_rows = spoiled.view(len(values), -1).any(dim=1)
        count = found.step(values, rows)
        assert count == int((spoiled if by_element else bad_rows).sum())
        if by_element:
            there = slice(None) if rows is None else rows
            before = {key: x[there].clone() for key, x in expected.elementwise().items()}
            expected.step(values.masked_fill(spoiled, 0.0), rows, leave_out=False)
            for key, x in expected.elementwise().items():
                x[there] = torch.where(spoiled, before[key], x[there])
        else:
            ids = torch.arange(shard.local_rows) if rows is None else rows
            expected.step(values[~bad_rows], ids[~bad_rows], leave_out=False)
        assert all(bool(x.isfinite().all()) for x in found.snapshot().values())
        if found.same_order:
            assert_same(found.snapshot(), expected.snapshot())
        else:
            torch.testing.assert_close(found.snapshot(), expected.snapshot(), rtol=1e-5, atol=1e-6)
