"""Sparse gradients into count-sketches: rows are hashed once, and inserted by depth and part of the buckets."""

from __future__ import annotations

import pytest
import torch

from lightning_sketch import BFloat16, Codec, CountSketch, Drop, Factored, RowWise
from lightning_sketch.kernels import native
from tests.kernels.fused_cases import Case, by_isa, check, threads, train
from tests.tiny import assert_same

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")

INSTRUCTION_SETS = range(native.library().lightning_sketch_isa() + 1) if native.library() else ()
#: Wide enough that no bucket has many rows, which are inserted in another way.
SKETCHES: list[tuple[Codec, Codec]] = [
    (CountSketch(width=3000), CountSketch(width=3000)),
    (CountSketch(width=3000), CountSketch(width=1700, depth=4)),
    (CountSketch(width=2500, depth=1), Drop()),
    (CountSketch(width=3000), BFloat16()),
    (RowWise(compression=4), CountSketch(width=3000)),
    (RowWise(compression=4, depth=5), CountSketch(width=3000, depth=1)),
    (Factored(), CountSketch(width=3000)),
    (CountSketch(width=2900, depth=8), CountSketch(width=2900, depth=8)),
]


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        (4000, 3, torch.float32),
        (4000, 3, torch.bfloat16),
        (3500, 33, torch.float32),
        (3500, 33, torch.bfloat16),
        (3100, 1100, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(("second", "first"), SKETCHES)
def test_equal_to_the_reference(second: Codec, first: Codec, rows: int, columns: int, dtype: torch.dtype) -> None:
    check(Case("adam", second, first, rows, columns, sparse=True, dtype=dtype))


@pytest.mark.parametrize(("second", "first"), SKETCHES)
def test_the_same_bits_in_however_many_parts(second: Codec, first: Codec) -> None:
    results = []
    for number in INSTRUCTION_SETS:
        for count in (1, 2, 3, 16):
            with by_isa(number), threads(count):
                results.append(train(Case("adam", second, first, 4000, 17, sparse=True)))
    for result in results[1:]:
        assert_same(result, results[0])
