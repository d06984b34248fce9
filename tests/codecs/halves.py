"""A codec that is not the package's: all there is to it is in this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sketch import ElementwiseCodec


@dataclass(frozen=True)
class Halves(ElementwiseCodec):
    """float16, beside the largest magnitude of every row.

    Args:
        relative: whether values are divided by it.
    """

    relative: bool = True

    def encode(self, values: Tensor, signed: bool) -> dict[str, Tensor]:
        if not self.relative:
            return {"half": values.half()}
        # A zero beside each row, because a row may be of no elements.
        largest = pad(values.abs().flatten(1), (0, 1)).amax(dim=1) if values.ndim > 1 else values.abs()
        over = largest.where(largest > 0, torch.ones_like(largest)).view(-1, *[1] * (values.ndim - 1))
        return {
            "half": (values / over).half(),
            "largest": largest,
        }

    def decode(self, tensors: Mapping[str, Tensor], signed: bool) -> Tensor:
        half = tensors["half"].float()
        return half * tensors["largest"].view(-1, *[1] * (half.ndim - 1)) if self.relative else half
