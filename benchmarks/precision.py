"""Faster matrix products for training on CPUs with bfloat16 instructions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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


def product_dtype(device: torch.device) -> torch.dtype:
    """Of a product's inputs: bfloat16, but float32 on CPUs below AVX-512, which are ten times as slow at the former."""
    emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16
