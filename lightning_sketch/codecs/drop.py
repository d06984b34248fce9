"""No first moment at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.state import CodecState, StateSpec, Tensors


@dataclass(frozen=True)
class Drop(Codec):
    """Do not keep this first moment: ``beta1 = 0`` (Adam) or ``momentum = 0`` (SGD, RMSprop) for this layer.

    ``grad_avg`` dropped means an uncentered RMSprop. Always chosen by name, and `compress` logs where it happens.
    """

    drops: ClassVar[bool] = True
    live_blocks: ClassVar[int] = 6
    refuses_unsigned: ClassVar[str | None] = (
        "without a second moment the update is plain SGD at another learning rate; choose Factored or RowWise, "
        "which need about one number per row"
    )

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        return {}

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        return {}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        raise AssertionError("update rules skip a dropped state")
