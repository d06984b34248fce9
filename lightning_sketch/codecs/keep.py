"""Dense states: what torch.optim keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.state import CodecState, Count, Entry, Number, StateSpec, Tensors, add_scaled
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import DTYPES, KernelState
from lightning_sketch.sharding import Block


@dataclass(frozen=True)
class Keep(Codec):
    """Keep the state as it is: dense, in the parameter's dtype.

    A layer whose states are all kept is not touched by lightning_sketch at all: it trains through torch's own step.
    Beside a compressed state of the same layer, a kept state follows torch: under sparse gradients only the touched
    rows decay, as in ``torch.optim.SparseAdam``.
    """

    exact: ClassVar[bool] = True
    live_blocks: ClassVar[int] = 7
    elementwise: ClassVar[bool] = True

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        return {"": spec.zeros(*spec.local_shape, dtype=spec.param_dtype)}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {"": tuple(range(ndim))}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return DenseState(spec, tensors)


class DenseState(CodecState):
    """A tensor shaped like the parameter."""

    elementwise = True
    dense = Entry("")  # [local_rows, *row_shape], or a scalar's own shape
    can_follow: ClassVar[bool] = True
    decay: Number
    weight: Number

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.decay, self.weight = decay, weight

    def add(self, block: Block, x: Tensor) -> None:
        dense = self.spec.shard.as_rows(self.dense)
        if isinstance(block.index, slice) and dense.dtype == x.dtype and block.good is None:
            add_scaled(dense[block.index].mul_(self.decay), x, self.weight)
        else:
            before = dense[block.index]
            values = self.store(block, add_scaled(before.to(x.dtype).mul(self.decay), x, self.weight))
            dense[block.index] = values if block.good is None else values.where(block.good, before)

    def store(self, block: Block, values: Tensor) -> Tensor:
        """What is written for `values`."""
        return values.to(self.dense.dtype)

    def fusable(self) -> bool:
        shard, dense = self.spec.shard, self.dense
        return dense.dtype in DTYPES and self.plain(dense, shard.local_rows * shard.row_numel, dense.dtype)

    def to_kernel(self) -> KernelState:
        return KernelState(Kind.DENSE, self.dense, None, self.decay, self.weight)

    def read(self, block: Block, x: Tensor) -> Tensor:
        return self.estimate(block)

    def estimate(self, block: Block) -> Tensor:
        return self.spec.shard.as_rows(self.dense)[block.index].to(self.spec.dtype)
