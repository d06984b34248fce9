"""The compiled kernels leave out rows that are not finite: on every instruction set, with any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sketch import SM3, BFloat16, Codec, CountSketch, Drop, Factored, Keep, Quantized, RowWise
from lightning_sketch.kernels import native
from lightning_sketch.sharding import Shard
from tests.kernels.fused_cases import by_isa, threads
from tests.rules.left_out import Part, values_like
from tests.tiny import assert_same, default_dtype

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")

INSTRUCTION_SETS = range(native.library().lightning_sketch_isa() + 1) if native.library() else ()
#: First and second moment: one pair for every way through the kernels.
PAIRS: dict[str, tuple[Codec, Codec]] = {
    "rows": (BFloat16(), RowWise()),
    "sketched rows": (Drop(), RowWise(compression=4)),
    "factored": (Keep(), Factored()),
    "SM3": (Drop(), SM3()),
    "SM3 and momentum": (Drop(), SM3(momentum=0.5)),
    "elements": (BFloat16(), BFloat16(stochastic=False)),
    "elements in long lines": (Keep(), CountSketch(width=1 << 20)),
    "sketches, in strips": (CountSketch(20), CountSketch(20)),
    "one sketch, in strips": (Drop(), CountSketch(20)),
    "sketches, by bucket": (BFloat16(), CountSketch(20)),
    "sketches, by depth": (CountSketch(1.1, depth=2), CountSketch(1.1, depth=2)),
    "quantized": (Quantized(), Quantized(bits=4)),
    "a sketch and rows": (CountSketch(3), RowWise()),
}
#: Of many tasks that sum up columns; of rows of several chunks, with a tail; of two long rows; of sketches in strips.
SHAPES = [(40_000, 3), (300, 1029), (2, 70_000), (2000, 300)]


def part(pair: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, rule: str = "adamw") -> Part:
    return Part.make(rule, *PAIRS[pair], Shard.whole(shape), dtype)


def bad_elements(shape: tuple[int, int]) -> Tensor:
    """Some in the first and in the last row, and some between."""
    rows, columns = shape
    bad = torch.zeros(shape, dtype=torch.bool)
    bad[0, 0] = bad[-1, -1] = bad[rows // 2] = True
    if rows > 2:
        bad[rows // 3, columns // 2] = True
        bad[rows * 3 // 4 : rows * 3 // 4 + 20] = True
    return bad


def spoiled(values: Tensor, bad: Tensor) -> Tensor:
    values = values.masked_fill(bad, torch.nan)
    values[0, 0], values[-1, -1] = torch.inf, -torch.inf
    return values


def without(of: Part, values: Tensor, bad: Tensor) -> None:
    """A step without what is not finite: of zeros there, after which parameter and own states are put back."""
    rows = bad.any(dim=1)
    # Zeros have a say in the maxima of SM3, and in the codes of a quantized row.
    if of.tensors.keys() & {"exp_avg_sq_dim1", "exp_avg_sq_codes"}:
        of.step(values[~rows], (~rows).nonzero().flatten(), leave_out=False)
        return
    where = bad if of.bound.unit[1] else rows[:, None]
    before = {key: x.clone() for key, x in of.elementwise().items()}
    of.step(values.masked_fill(where, 0.0), leave_out=False)
    for key, x in of.elementwise().items():
        x.copy_(torch.where(where, before[key], x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_large_layers(pair: str, shape: tuple[int, int]) -> None:
    finite, bad = values_like(Shard.whole(shape), 1), bad_elements(shape)
    expected = part(pair, shape)
    expected.step(finite)
    without(expected, finite, bad)
    for number in INSTRUCTION_SETS:
        for count in (1, 3):
            with by_isa(number), threads(count):
                found = part(pair, shape)
                assert found.step(finite) == 0
                assert found.step(spoiled(finite, bad)) == int((bad if found.bound.unit[1] else bad.any(dim=1)).sum())
                assert found.fused
            assert_same(found.snapshot(), expected.snapshot())


@pytest.mark.parametrize("pair", PAIRS)
def test_scattered_rows(pair: str) -> None:
    """Of sparse gradients: the sketches have more buckets than these have rows."""
    shape, ids = (5000, 9), torch.arange(0, 5000, 7)
    values = values_like(Shard.whole((len(ids), 9)), 1)
    bad = bad_elements((len(ids), 9))
    rows = bad.any(dim=1)
    expected = part(pair, shape)
    if expected.bound.unit[1]:
        before = {key: x[ids].clone() for key, x in expected.elementwise().items()}
        expected.step(values.masked_fill(bad, 0.0), ids, leave_out=False)
        for key, x in expected.elementwise().items():
            x[ids] = torch.where(bad, before[key], x[ids])
    else:
        expected.step(values[~rows], ids[~rows], leave_out=False)
    for count in (1, 3):
        with threads(count):
            found = part(pair, shape)
            assert found.step(spoiled(values, bad), ids) == int((bad if found.bound.unit[1] else rows).sum())
        if pair == "factored":  # the columns of fewer rows are summed in other pieces
            torch.testing.assert_close(found.snapshot(), expected.snapshot(), rtol=1e-5, atol=1e-6)
        else:
            assert_same(found.snapshot(), expected.snapshot())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_element_is_looked_at(pair: str, dtype: torch.dtype, bad: float) -> None:
    shape = (3, 90)
    for number in INSTRUCTION_SETS:
        found = part(pair, shape, dtype)
        for at in (0, 15, 16, 63, 64, 79, 80, 89):
            values = values_like(Shard.whole(shape), at, dtype)
            values[1, at] = bad
            with by_isa(number):
                assert found.step(values) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_finite_gradients_are_stepped_as_under_propagate(pair: str, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (300, 1029), (2000, 300)):
        found, expected = (part(pair, shape, dtype, rule="adam") for _ in range(2))
        values = values_like(Shard.whole(shape), 1, dtype)
        # Its square overflows, but for a codec that must not add it to the sums of all rows.
        values[0, 0] = 1e13 if pair == "factored" else torch.finfo(dtype).max
        for _ in range(2):
            assert found.step(values) == expected.step(values, leave_out=False) == 0
        assert_same(found.snapshot(), expected.snapshot())


def test_torchs_default_dtype_and_device_are_not_theirs() -> None:
    values = values_like(Shard.whole((300, 9)), 1)
    values[3, 3] = torch.nan
    found, expected = part("factored", (300, 9)), part("factored", (300, 9))
    assert expected.step(values) == 1
    with default_dtype(torch.bfloat16), torch.device("meta"):
        assert found.step(values) == 1
    assert_same(found.snapshot(), expected.snapshot())
