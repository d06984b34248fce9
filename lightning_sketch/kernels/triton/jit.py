"""`triton.jit` with types, and the kinds of states as compile-time constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from lightning_sketch.kernels.fields import Kind

#: A function called by kernels.
inlined: Callable[[Callable[..., Any]], Any] = triton.jit


def kernel(*unspecialized: str) -> Callable[[Callable[..., Any]], Any]:
    """A kernel.

    Args:
        unspecialized: integers whose values (1, multiples of 16) must not lead to another compilation, because they
            change from step to step or from layer to layer.
    """
    decorator: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=unspecialized)
    return decorator


#: As little fusing of multiplications and additions as in the reference; memory is what takes time.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
#: The same where four warps would take too many registers each.
WIDE_OPTIONS: dict[str, Any] = OPTIONS | {"num_warps": 8}

# Kernels see no other global values than these.
NONE = tl.constexpr(int(Kind.NONE))
STOCHASTIC = tl.constexpr(int(Kind.STOCHASTIC))
SCALED = tl.constexpr(int(Kind.SCALED))
ROW = tl.constexpr(int(Kind.ROW))
ROW_SKETCH = tl.constexpr(int(Kind.ROW_SKETCH))
SM3 = tl.constexpr(int(Kind.SM3))
FACTORED = tl.constexpr(int(Kind.FACTORED))
SKETCH = tl.constexpr(int(Kind.SKETCH))
QUANTIZED = tl.constexpr(int(Kind.QUANTIZED))
