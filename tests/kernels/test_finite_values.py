"""NaN and inf in gradients under ``nonfinite="propagate"``: they reach the same elements as in the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_sketch import SM3, BFloat16, Codec, Drop, Policy, Quantized, RowWise, Rule, compress
from lightning_sketch.kernels import cpu, native
from tests.kernels.fused_cases import by_isa, by_reference

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")

INSTRUCTION_SETS = range(native.library().lightning_sketch_isa() + 1) if native.library() else ()
MOMENTS = [(BFloat16(), BFloat16()), (Drop(), RowWise()), (Quantized(), Quantized(bits=4))]
ROWS = 12
#: Two that are shorter than a vector or end in the middle of one, and one that is cut into pieces.
COLUMNS = (5, 33, 5000)


def bad_values(dtype: torch.dtype) -> Tensor:
    """Of both signs: NaNs out of whose bits rounding may carry or which it may cut off, inf, the largest number."""
    bits, integer = (16, torch.int16) if dtype == torch.bfloat16 else (32, torch.int32)
    sign, one = -(1 << (bits - 1)), 1 << (7 if dtype == torch.bfloat16 else 23)
    infinite = 255 * one
    patterns = [infinite + one - 1, infinite + one // 2, infinite + 1, infinite, infinite - 1]
    return torch.tensor([*patterns, *(sign + pattern for pattern in patterns)], dtype=integer).view(dtype)


def train(columns: int, dtype: torch.dtype, first: Codec, second: Codec) -> list[dict[str, Tensor]]:
    """The parameter and its states after each of three steps; the second has a bad value in most rows."""
    generator = torch.Generator().manual_seed(columns)
    layer = nn.Embedding(ROWS, columns, dtype=dtype, _weight=torch.randn(ROWS, columns, generator=generator).to(dtype))
    policy = Policy([Rule(name="*", first_moment=first, second_moment=second)])
    optimizer = compress(AdamW(layer.parameters(), lr=0.1), layer, policy, nonfinite="propagate")
    found = []
    for step in range(3):
        gradient = torch.randn(ROWS, columns, generator=generator).to(dtype)
        if step == 1:
            for row, value in enumerate(bad_values(dtype)):
                gradient[row, (row * 7, columns - 1)[row % 2] % columns] = value
        layer.weight.grad = gradient
        optimizer.step()
        states = {key: value for key, value in optimizer.state[layer.weight].items() if isinstance(value, Tensor)}
        found.append({key: value.detach().clone() for key, value in ({"weight": layer.weight} | states).items()})
    return found


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "second"), MOMENTS, ids=repr)
def test_they_are_where_the_reference_has_them(
    first: Codec, second: Codec, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with by_reference():
        expected = train(columns, dtype, first, second)
    weights = [states["weight"].isfinite() for states in expected]
    assert weights[0].all()
    assert all(weight.any() and not weight.all() for weight in weights[1:])
    packed: list[None] = []
    pack = cpu._pack
    monkeypatch.setattr(cpu, "_pack", lambda *arguments: packed.append(None) or pack(*arguments))
    for number in INSTRUCTION_SETS:
        packed.clear()
        with by_isa(number):
            found = train(columns, dtype, first, second)
        assert len(packed) == len(expected), "steps were left to the reference"
        for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                where = f"{key} after step {step}, {native.ISAS[number]}"
                assert torch.equal(_kinds(mine[key]), _kinds(value)), where


def test_maxima_of_sm3_pass_over_nan() -> None:
    """Only the element becomes NaN; the reference spreads it over its row and column, and from there over the table."""
    layer = nn.Embedding(ROWS, 40)
    optimizer = compress(
        AdamW(layer.parameters()),
        layer,
        Policy([Rule(name="*", first_moment=Drop(), second_moment=SM3())]),
        nonfinite="propagate",
    )
    for number in INSTRUCTION_SETS:
        expected = torch.zeros(ROWS, 40, dtype=torch.bool)
        nn.init.normal_(layer.weight)
        with by_isa(number):
            for step in range(3):
                layer.weight.grad = torch.randn(ROWS, 40)
                if step == 1:
                    layer.weight.grad[3, 17] = float("nan")
                    expected[3, 17] = True
                optimizer.step()
                assert torch.equal(layer.weight.isnan(), expected), native.ISAS[number]


def _kinds(values: Tensor) -> Tensor:
    """0 for a number, and 1, 2, 3 for NaN, inf, -inf."""
    return values.isnan() * 1 + values.isposinf() * 2 + values.isneginf() * 3
