"""Sparse gradients summed to distinct rows, by the compiled library: a torch operator."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_sketch.kernels import native
from lightning_sketch.kernels.schema import DTYPES


def coalesce(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort row ids and sum the rows that have the same one, in the order in which they come.

    Sums are taken in float32, whatever the dtype, and do not depend on the number of threads.

    Args:
        ids: int64 ``[n]`` in [0, 2**32), in any order; n below 2**31. On the CPU.
        values: ``[n, *row_shape]``, float32 or bfloat16.

    Returns:
        distinct ids ``[k]``, ascending, and their sums ``[k, *row_shape]``.

    Raises:
        ValueError: an id is outside [0, 2**32), or the tensors are not as said.
    """
    rows: Tensor
    sums: Tensor
    rows, sums = torch.ops.lightning_sketch.coalesce(ids.contiguous(), values.contiguous())
    return rows, sums


def _coalesce(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    lib = native.library()
    assert lib is not None
    count = ids.numel()
    if ids.dtype != torch.int64 or ids.ndim != 1 or values.dtype not in DTYPES or values.shape[:1] != ids.shape:
        raise ValueError(
            f"row ids of shape {list(ids.shape)} and {ids.dtype}, values of {list(values.shape)} and {values.dtype}: "
            "they must be int64 [n], and float32 or bfloat16 [n, ...]"
        )
    rows = torch.empty(count, dtype=torch.int64, device="cpu")
    order = torch.empty(count, dtype=torch.int32, device="cpu")
    starts = torch.empty(count + 1, dtype=torch.int32, device="cpu")
    scratch = torch.empty(2 * count, dtype=torch.int64, device="cpu")
    distinct = lib.lightning_sketch_sort_ids(
        _address(ids), ctypes.c_int64(count), _address(rows), _address(order), _address(starts), _address(scratch)
    )
    if distinct < 0:
        raise ValueError(f"row ids run from {int(ids.min())} to {int(ids.max())}; they must be in [0, 2**32)")
    del scratch  # as large as two columns of the gradient
    sums = values.new_empty((distinct, *values.shape[1:]))
    lib.lightning_sketch_sum_rows(
        _address(values),
        ctypes.c_int64(values.numel() // max(1, count)),
        ctypes.c_int32(values.dtype == torch.bfloat16),
        _address(order),
        _address(starts),
        ctypes.c_int64(distinct),
        _address(sums),
        torch.get_num_threads(),
        ctypes.c_void_p(native.gomp_parallel()),
    )
    return rows[:distinct].clone(), sums


def _fake(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    distinct = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(distinct), values.new_empty((distinct, *values.shape[1:]))


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_OPERATORS = torch.library.Library("lightning_sketch", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define("coalesce(Tensor ids, Tensor values) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_OPERATORS.impl("coalesce", _coalesce, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("lightning_sketch::coalesce", _fake)
