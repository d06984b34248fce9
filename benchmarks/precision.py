"""Faster matrix products for training on CPUs with bfloat16 instructions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Inputs of matrix products are rounded to bfloat16; sums and results stay float32.

    Without such instructions, or in a torch older than the setting, products stay float32.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def bfloat16_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of bfloat16 matrices, in bfloat16.

    CPUs without such instructions (below AVX-512) multiply in float32 and round once: ten times as fast there.
    """
    if a.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return a @ b
    return (a.float() @ b.float()).bfloat16()
