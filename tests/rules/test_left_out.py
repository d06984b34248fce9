"""Rows that are not finite are left out of a step: as if a sparse gradient did not have them.

By the reference and by the compiled kernels. Where all states are stored by
element, elements are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_sketch import SM3, BFloat16, Codec, Drop, Factored, Keep, RowWise
from lightning_sketch.rules import run
from lightning_sketch.sharding.gradient import RowGradient
from tests.conformance.cases import VARIANTS
from tests.kernels.fused_cases import by_reference
from tests.rules.left_out import SHARDS, Part, check, spoil, values_like
from tests.tiny import assert_same

#: Of a second moment. Each beside a dense first one, under every rule and layout: tests/conformance/test_left_out.py.
SECOND: dict[str, Codec] = {
    name: variant.codec for name, variant in VARIANTS.items() if variant.codec.refuses_unsigned is None
}
#: Of a first moment.
FIRST: dict[str, Codec] = {
    name: VARIANTS[name].codec for name in ("Drop", "BFloat16", "CountSketch", "CountSketch exact", "Quantized")
}
ENGINES: dict[str, Callable[[], Any]] = {"compiled": contextlib.nullcontext, "reference": by_reference}


#: Codecs beside which every codec of a first moment is tested.
BESIDE_ALL = (
    "RowWise",
    "RowWise sketched",
    "SM3",
    "Factored",
    "CountSketch",
    "BFloat16",
    "CountSketch of the paper",
    "Quantized",
)


engines = pytest.mark.parametrize("engine", ENGINES)


@engines
@pytest.mark.parametrize("second", BESIDE_ALL)
@pytest.mark.parametrize("first", FIRST)
def test_a_row_that_is_not_finite_is_absent_from_both_moments(first: str, second: str, engine: str) -> None:
    def make() -> Part:
        return Part.make("adamw", FIRST[first], SECOND[second], SHARDS["whole"])

    values = values_like(SHARDS["whole"], 3)
    ids = torch.tensor([0, 3, 4, 11, 12, 20, 39])
    with ENGINES[engine]():
        check(make, spoil(values))
        check(make, spoil(values[: len(ids)]), ids)


@engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("second", BESIDE_ALL)
def test_in_any_dtype(second: str, dtype: torch.dtype, engine: str) -> None:
    with ENGINES[engine]():
        check(
            lambda: Part.make("adam", Keep(), SECOND[second], SHARDS["whole"], dtype),
            spoil(values_like(SHARDS["whole"], 3, dtype)),
        )


@pytest.mark.parametrize("second", SECOND)
def test_a_mask_that_leaves_nothing_out_changes_nothing(second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators the reference has one in every step, because it does not wait to learn that all is finite."""
    parts = [Part.make("adam", Keep(), SECOND[second], SHARDS["whole"]) for _ in range(2)]
    values = values_like(SHARDS["whole"], 3)
    with by_reference():
        expected = [part.step(values) for part in parts]
        monkeypatch.setattr("lightning_sketch.sharding.gradient.all_finite", lambda values: False)
        monkeypatch.setattr("lightning_sketch.rules.layer_step.all_finite", lambda values: False)
        assert [parts[0].step(values), parts[1].step(values, leave_out=False)] == expected == [0, 0]
    assert_same(parts[0].snapshot(), parts[1].snapshot())


@engines
@pytest.mark.parametrize("value", [1e30, 3e14])  # the square overflows, or would in a sum
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_a_row_with_huge_squares_is_left_out_where_all_rows_share_them(floor: float, value: float, engine: str) -> None:
    with ENGINES[engine]():
        parts = [Part.make("adamw", Drop(), Factored(floor=floor), SHARDS["whole"]) for _ in range(2)]
        for step in range(2):
            huge, bad = (values_like(parts[0].shard, 3 + step) for _ in range(2))
            huge[5, 2] = huge[39, 5] = value
            bad[5, 2] = bad[39, 5] = torch.nan
            assert parts[0].step(huge) == parts[1].step(bad) == 2
        assert_same(parts[0].snapshot(), parts[1].snapshot())
        assert parts[0].bound.param.isfinite().all()


@engines
@pytest.mark.parametrize("second", [name for name, codec in SECOND.items() if not isinstance(codec, Factored)])
def test_squares_that_overflow_are_finite_gradients(second: str, engine: str) -> None:
    with ENGINES[engine]():
        parts = [Part.make("adamw", Drop(), SECOND[second], SHARDS["whole"]) for _ in range(2)]
        values = values_like(parts[0].shard, 3)
        values[5, 2] = values[39, 5] = 1e30
        assert parts[0].step(values) == parts[1].step(values, leave_out=False) == 0
        assert_same(parts[0].snapshot(), parts[1].snapshot())


@engines
def test_a_parameter_that_is_not_finite_is_no_reason(engine: str) -> None:
    """Coupled weight decay adds it to the gradient; what is judged is the gradient as it was given."""
    for codec in (RowWise(), RowWise(compression=4), Factored(), SM3(), BFloat16()):
        part = Part.make("adam", Drop(), codec, SHARDS["whole"])
        part.bound.param[3, 0] = torch.inf
        with ENGINES[engine]():
            # All rows share the sums of Factored, so that what would spoil them is left out.
            assert part.step(values_like(part.shard, 3)) == isinstance(codec, Factored)


@engines
def test_counts_are_in_the_order_of_the_layers(engine: str) -> None:
    codecs = [RowWise(), BFloat16(), RowWise(lazy=True), SM3("I"), Factored()]
    parts = [Part.make("adamw", Drop(), codec, SHARDS["whole"]) for codec in codecs]
    layers = []
    for bad, part in enumerate(parts):
        values = values_like(part.shard, 3)
        values[:bad, 1:3] = torch.nan
        gradient, numbers = RowGradient(part.shard, None, values), part.rule.numbers(part.group, 1)
        layers.append(part.bound.step(gradient, numbers, 1, maximize=False, leave_out=True))
    with ENGINES[engine]():
        counts = run(parts[0].rule, layers)
    assert counts is not None
    assert (counts.dtype, counts.tolist()) == (torch.int64, [0, 2, 2, 3, 4])
