"""The base of codecs that store element by element: say how to encode and how to decode, and nothing else."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.state import CodecState, Count, Number, StateSpec, Tensors, add_scaled
from lightning_sketch.sharding import Block


@dataclasses.dataclass(frozen=True)
class ElementwiseCodec(Codec):
    """A codec of which `encode` and `decode` are all there is to say.

    A subclass is a frozen dataclass of its options. Once it is defined, policies, YAML and checkpoints know it by the
    name of the class; checkpoints of it load where that module was imported before.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Half(ElementwiseCodec):
        ...     def encode(self, values, signed):
        ...         return {"half": values.half()}
        ...
        ...     def decode(self, tensors, signed):
        ...         return tensors["half"].float()
    """

    elementwise: ClassVar[bool] = True
    steps_together: ClassVar[bool] = False  # what a subclass calls may be more than vmap can do

    @abstractmethod
    def encode(self, values: Tensor, signed: bool) -> dict[str, Tensor]:
        """What is stored of some rows of a state.

        Must not depend on which rows these are, and must encode what was decoded to the same tensors, so that rows that
        a step does not touch stay as they are. No waiting for a device: no ``.item()``, no branch on a value.

        Args:
            values: float32 or float64, ``[k, *row_shape]``; on the meta device, too.
            signed: whether the state may be negative.

        Returns:
            by suffix tensors of ``[k, *row_shape]``, or of ``[k]`` for a number a row.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], signed: bool) -> Tensor:
        """The values, ``[k, *row_shape]`` in any floating dtype, of what `encode` returned."""

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        return self.encode(spec.zeros(*spec.local_shape), spec.signed)

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        probe = torch.zeros(*range(2, ndim + 2), device="meta")
        shapes = {suffix: tensor.shape for suffix, tensor in self.encode(probe, signed=False).items()}
        for suffix, shape in shapes.items():
            if shape not in (probe.shape, probe.shape[:1]):
                raise TypeError(
                    f"{type(self).__name__}.encode of {list(probe.shape)} returned {suffix!r} of {list(shape)}: must "
                    "be shaped like the values, or hold a number a row"
                )
        return {suffix: tuple(range(len(shape))) for suffix, shape in shapes.items()}

    def nbytes(self, spec: StateSpec) -> int:
        meta = torch.zeros(spec.local_shape, dtype=spec.dtype, device="meta")
        return sum(tensor.nbytes for tensor in self.encode(meta, spec.signed).values())

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return _State(self, spec, tensors)


class _State(CodecState):
    adds_values: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    decay: Number
    weight: Number

    def __init__(self, codec: ElementwiseCodec, spec: StateSpec, tensors: Tensors) -> None:
        super().__init__(spec, tensors)
        self.codec = codec
        self.suffixes = tuple(codec.axes(max(1, len(spec.local_shape))))

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.decay, self.weight = decay, weight

    def read(self, block: Block, x: Tensor) -> Tensor:
        before = self.estimate(block)
        values = add_scaled(before.mul(self.decay), x, self.weight)
        if block.good is not None:
            values = values.where(block.good, before)
        for suffix, encoded in self.codec.encode(values, self.spec.signed).items():
            self._rows(suffix)[block.index] = encoded
        return values

    def estimate(self, block: Block) -> Tensor:
        held = {suffix: self._rows(suffix)[block.index] for suffix in self.suffixes}
        return self.codec.decode(held, self.spec.signed).to(self.spec.dtype)

    def _rows(self, suffix: str) -> Tensor:
        tensor: Tensor = self[suffix]
        return tensor.view(1) if tensor.ndim == 0 else tensor  # of a scalar
