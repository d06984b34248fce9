"""Hashes and roundings inside kernels; `kernels/reference.py` and `codecs/bfloat16.py` are their specification.

bfloat16 tensors come as int16: Triton's interpreter rounds bfloat16 wrongly, and these few integer operations are the
same everywhere.
"""

from __future__ import annotations

import triton.language as tl

from lightning_sketch.kernels.triton.jit import inlined


@inlined
def mix64(x: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """SplitMix64's finaliser of ``x + seed``; both uint64."""
    x = x + seed * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@inlined
def bucket_of(row_id: tl.tensor, seed: tl.tensor, level: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Bucket (int64) and sign (float32) of rows at one depth of a sketch.

    Args:
        row_id, seed: uint64.
        width: int64.
    """
    bits = mix64(row_id, seed + (level + 1))
    bucket = ((bits >> 32) * width.to(tl.uint64)) >> 32
    sign = (bits & 1).to(tl.float32) * 2.0 - 1.0
    return bucket.to(tl.int64), sign


@inlined
def widen(half: tl.tensor) -> tl.tensor:
    """The float32 of bfloat16's bits, int16."""
    return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@inlined
def narrow(x: tl.tensor) -> tl.tensor:
    """bfloat16's bits of float32: to the nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = _sum(bits, ((bits >> 16) & 1) + 0x7FFF) >> 16
    quiet = (bits >> 16) | 0x40
    return tl.where(x == x, rounded, quiet).to(tl.int16)


@inlined
def narrow_stochastically(x: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """bfloat16's bits of float32: up with probability equal to the fraction cut off.

    Args:
        noise: uint32, 16 uniform bits.
    """
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = _sum(bits, tl.where(finite, noise, 0)) >> 16
    return tl.where(x == x, rounded, rounded | 0x40).to(tl.int16)  # NaN stays NaN


@inlined
def noise16(row: tl.tensor, column: tl.tensor) -> tl.tensor:
    """16 uniform bits (uint32) for each element, from the hashes of its row and its column (uint32)."""
    return mixed(row, column) >> 16


@inlined
def mixed(row: tl.tensor, column: tl.tensor) -> tl.tensor:
    """32 bits (uint32) of which the upper 16 are `noise16`."""
    x = _times(row ^ column, 2654435769)
    x = x ^ (x.to(tl.int32, bitcast=True) >> 15).to(tl.uint32, bitcast=True)
    return _times(x, 2246822507)


@inlined
def _times(x: tl.tensor, factor: tl.constexpr) -> tl.tensor:
    return tl.mul(x, factor, sanitize_overflow=False)  # wrapping is meant; Triton's debug mode checks otherwise


@inlined
def _sum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.add(x, y, sanitize_overflow=False)


@inlined
def lesser(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The minimum, or NaN if either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@inlined
def greater(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The maximum, or NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@inlined
def load(values: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """float32 from float32 or bfloat16, zero where masked."""
    found = tl.load(values + at, mask=mask, other=0)
    if values.dtype.element_ty == tl.int16:
        found = widen(found)
    return found


@inlined
def store(values: tl.tensor, at: tl.tensor, x: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Store float32 as float32 or bfloat16, and return what was stored as float32."""
    if values.dtype.element_ty == tl.int16:
        half = narrow(x)
        tl.store(values + at, half, mask=mask)
        x = widen(half)
    else:
        tl.store(values + at, x, mask=mask)
    return x


@inlined
def row_of(ids: tl.tensor, i: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Local row ids (int64) of the gradient's i-th rows."""
    if ids is not None:
        i = tl.load(ids + i, mask=mask, other=0)
    return i


@inlined
def not_finite_bits(values: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Where elements are NaN or infinite, int32: -1 there, else 0, also where masked.

    No predicates, because those of a tile are more than there are registers for, and would be spilled.
    """
    bits = load(values, at, mask).to(tl.int32, bitcast=True)
    return tl.add(bits & 0x7F800000, 0x00800000, sanitize_overflow=False) >> 31


@inlined
def chosen(where: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """`x` where there is -1, float32 or int16 as it is, else `y`."""
    if x.dtype == tl.int16:
        found = y ^ ((x ^ y) & where.to(tl.int16))
    else:
        of_x, of_y = x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True)
        found = (of_y ^ ((of_x ^ of_y) & where)).to(tl.float32, bitcast=True)
    return found


@inlined
def gradient(
    grad: tl.tensor,
    param: tl.tensor,
    at: tl.tensor,
    at_param: tl.tensor,
    mask: tl.tensor,
    sign: tl.tensor,
    weight_decay: tl.tensor,
    DECAYED: tl.constexpr,
) -> tl.tensor:
    """The gradient after maximize (sign -1) and coupled weight decay."""
    g = load(grad, at, mask) * sign
    if DECAYED:
        g += load(param, at_param, mask) * weight_decay
    return g
