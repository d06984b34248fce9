"""Drive one codec by hand, without an optimizer, and say what it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import Codec, Drop, StateSpec, allocate, decode
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.gradient import RowGradient
from tests.conformance.cases import VARIANTS

#: Every codec that stores anything, in each of its algorithms.
STORING: tuple[Codec, ...] = tuple(v.codec for v in VARIANTS.values() if not isinstance(v.codec, Drop))


def make_spec(shape: tuple[int, ...], *, signed: bool = False, shard: Shard | None = None, **fields: Any) -> StateSpec:
    """A second moment (or, if `signed`, a first one) of a float32 parameter of the given global shape."""
    defaults: dict[str, Any] = {
        "name": "exp_avg" if signed else "exp_avg_sq",
        "fqn": "layer.weight",
        "seed": 7,
        "dtype": torch.float32,
        "param_dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    shard = shard or Shard(shape, 0, shape[0] if shape else 1)
    return StateSpec(signed=signed, shard=shard, **defaults | fields)


class Driver:
    """A codec bound to fresh tensors."""

    def __init__(self, codec: Codec, spec: StateSpec) -> None:
        self.codec, self.spec = codec, spec
        self.tensors: dict[str, Any] = allocate(codec, spec)
        self.steps = 0

    def step(self, x: Tensor, rows: Tensor | None = None, *, decay: float = 1.0, weight: float = 1.0) -> Tensor:
        """One step, ``s <- decay * s + weight * x``; what the update rule would read, ``x.shape``."""
        self.steps += 1
        gradient = RowGradient(self.spec.shard, rows, x)
        state = self.codec.bind(self.spec, self.tensors)
        state.begin(decay=decay, weight=weight, step=self.steps, rows=rows)
        for block in gradient.blocks:
            state.add(block, x[block.span])
        state.settle()
        found = torch.zeros_like(x)
        for block in gradient.blocks:
            found[block.span] = state.read(block, x[block.span])
        state.commit()
        return found

    def ema(self, x: Tensor, rows: Tensor | None = None, *, beta: float = 0.9) -> Tensor:
        return self.step(x, rows, decay=beta, weight=1 - beta)

    @property
    def state(self) -> Tensor:
        """The stored state, dense."""
        return decode(self.codec, self.spec, self.tensors)


def scattered(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """The dense tensor of `total` rows that holds `values` at `rows`."""
    dense = torch.zeros(total, *values.shape[1:], dtype=values.dtype)
    dense[rows] = values
    return dense


def sparse_steps(rows: int, dim: int, steps: int, touched: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """``(rows, values)`` of some steps: distinct row ids, sorted, and normal values ``[touched, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randperm(rows, generator=generator)[:touched].sort().values,
         torch.randn(touched, dim, generator=generator))
        for _ in range(steps)
    ]  # fmt: skip
