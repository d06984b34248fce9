"""The Triton kernels on states of 8 and 4 bits, in Triton's interpreter: bit for bit those of the reference.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
    kernels,
)
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.kernels.triton import launch, launches, layout
from tests.kernels.fused_cases import Case, by_reference, check, train, unraised
from tests.rules.left_out import SHARDS, Part, values_like
from tests.tiny import assert_same

FOUR = Quantized(bits=4, block=32)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FusedStep]]:
    """Have every step done by the Triton kernels, and see which."""
    seen: list[FusedStep] = []

    def step(steps: Sequence[FusedStep]) -> Tensor:
        seen.extend(steps)
        return launch.step(steps)

    monkeypatch.setattr(kernels, "fused_kernel", lambda device: step)
    return seen


def check_bits(case: Case) -> None:
    """The states are those of the reference bit for bit, and the parameter up to its last bits."""
    found = train(case)
    with by_reference():
        expected = train(case)
    weight, other = found.pop("weight"), expected.pop("weight")
    assert_same(found, expected)
    torch.testing.assert_close(weight, other, rtol=2.0**-7 if case.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


#: Second and first moment.
BOTH = [
    (Quantized(), Quantized()),
    (FOUR, FOUR),
    (Quantized(block=1024), Quantized(bits=4, block=16)),
    (FOUR, Quantized()),
]


@pytest.mark.parametrize("columns", [1, 15, 136])
@pytest.mark.parametrize(("second", "first"), BOTH, ids=repr)
def test_states_are_the_references_bit_for_bit(
    second: Codec, first: Codec, columns: int, fused: list[FusedStep]
) -> None:
    sparse, dtype = columns == 15, torch.bfloat16 if columns == 136 else torch.float32
    check_bits(Case("adamw", second, first, rows=9, columns=columns, sparse=sparse, dtype=dtype, steps=2))
    assert len(fused) == 2


@pytest.mark.parametrize("columns", [1500, 4104])
def test_blocks_of_rows_wider_than_a_tile(columns: int) -> None:
    check_bits(Case("adamw", Quantized(), FOUR, rows=2, columns=columns, steps=2))
    check(Case("adamw", RowWise(), Quantized(block=1024), rows=2, columns=columns, steps=1))


OTHER_SECOND: list[Codec] = [
    RowWise(),
    RowWise(compression=4),
    RowWise(lazy=True),
    SM3(),
    Factored(),
    CountSketch(4),
    Keep(),
    BFloat16(),
    BFloat16(stochastic=False),
]
OTHER_FIRST: list[Codec] = [Drop(), Keep(), BFloat16(), CountSketch(4), CountSketch(4, depth=5)]


@pytest.mark.parametrize("turn", range(len(OTHER_SECOND)), ids=lambda turn: repr(OTHER_SECOND[turn]))
def test_a_first_moment_beside_every_other_second(turn: int, fused: list[FusedStep]) -> None:
    """By turns of 8 and 4 bits, under dense and sparse gradients."""
    first, sparse = (Quantized(), FOUR)[turn % 2], turn % 4 in (2, 3)
    check(Case("adamw", OTHER_SECOND[turn], first, 13, 37, sparse, steps=2))
    assert len(fused) == 2


@pytest.mark.parametrize("turn", range(len(OTHER_FIRST)), ids=lambda turn: repr(OTHER_FIRST[turn]))
def test_a_second_moment_beside_every_other_first(turn: int, fused: list[FusedStep]) -> None:
    check(Case("adamw", (FOUR, Quantized())[turn % 2], OTHER_FIRST[turn], 13, 40, sparse=turn % 4 in (1, 2), steps=2))
    assert len(fused) == 2


@pytest.mark.parametrize("rule", ["adam", "adagrad", "rmsprop", "sgd", "nesterov", "sparse_adam"])
def test_every_rule(rule: str, fused: list[FusedStep]) -> None:
    check(Case(rule, Quantized(), Quantized(), rows=7, columns=33, sparse=rule == "sparse_adam", steps=2))
    assert len(fused) == 2


@pytest.mark.parametrize("second", [Quantized(block=16), RowWise()], ids=repr)
def test_parts_of_large_layers(second: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this small layer were large: rows wider than a tile, several programs."""
    small = {"TILE": 64, "TILE_COLUMNS": 16, "LINE_BYTES": 64, "WIDEST_ROW": 16, "TILE_HASH": 16}
    for name, value in small.items():
        monkeypatch.setattr(layout, name, value)
    for name in ("TILE_COLUMNS", "TILE_HASH"):
        monkeypatch.setattr(launches, name, small[name])
    check(Case("adamw", second, Quantized(bits=4, block=16), rows=9, columns=37, steps=2))


@pytest.mark.parametrize("shard", ["row shard", "column shard"])
def test_noise_goes_by_the_place_in_the_whole_parameter(shard: str, fused: list[FusedStep]) -> None:
    values = values_like(SHARDS[shard], 1)
    found, expected = (Part.make("adamw", Quantized(), FOUR, SHARDS[shard]) for _ in range(2))
    found.step(values)
    assert len(fused) == 1
    with by_reference():
        expected.step(values)
    assert_same(found.tensors, expected.tensors)


def test_layers_of_one_launch(fused: list[FusedStep]) -> None:
    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleList(
            nn.Linear(columns, rows, bias=False) for rows, columns in ((9, 40), (1, 33), (20, 64), (2, 33))
        )
        policy = Policy([Rule(name="*", first_moment=Quantized(), second_moment=FOUR)])
        optimizer = compress(torch.optim.AdamW(model.parameters()), model, policy)
        for _ in range(2):
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            optimizer.step()
        states = enumerate(optimizer.state[param] for param in model.parameters())
        return {f"{number}.{name}": value for number, state in states for name, value in state.items()}

    found = run()
    assert len(fused) == 8
    with by_reference():
        assert_same(found, run())


def test_what_is_not_finite_stays_in_its_block_where_nothing_is_left_out() -> None:
    shape, codec = (4, 100), Quantized(block=16)
    first, second = values_like(SHARDS["whole"], 1).new_zeros(shape), torch.randn(shape, generator=_generator())
    first[:] = torch.randn(shape, generator=_generator())
    second[0, 3], second[1, 50], second[2, 99] = math.nan, math.inf, 1e30  # of the last, the square overflows

    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(100, 4, bias=False)
        policy = Policy([Rule(name="*", first_moment=codec, second_moment=codec)])
        optimizer = compress(torch.optim.AdamW(layer.parameters()), layer, policy, nonfinite="propagate")
        for values in (first, second):
            layer.weight.grad = values.clone()
            optimizer.step()
        return dict(optimizer.state[layer.weight])

    found = run()
    assert found["exp_avg_sq_absmax"].isnan().sum() == 3
    with by_reference():
        expected = run()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_gradients_of_zeros_make_states_of_zeros() -> None:
    layer = nn.Linear(20, 3, bias=False)
    policy = Policy([Rule(name="*", first_moment=Quantized(), second_moment=FOUR)])
    optimizer = compress(torch.optim.AdamW(layer.parameters(), weight_decay=0.0), layer, policy)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, 1e-30)  # squares are below the least that a block holds
    layer.weight.grad[0] = 0.0
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert not state["exp_avg_sq_absmax"].any()
    assert not state["exp_avg_sq_codes"].any()
    assert not state["exp_avg_absmax"][0].any()
    assert torch.equal(layer.weight, before)


def test_empty_layers_and_single_elements() -> None:
    for rows, columns in ((0, 4), (4, 0), (1, 1)):
        check(Case("adamw", Quantized(), FOUR, rows, columns, steps=1))


def test_unaligned_gradients(fused: list[FusedStep]) -> None:
    def run() -> dict[str, Tensor]:
        layer = nn.Linear(24, 5, bias=False)
        policy = Policy([Rule(name="*", first_moment=FOUR, second_moment=Quantized())])
        optimizer = compress(torch.optim.AdamW(layer.parameters()), layer, policy)
        layer.weight.grad = torch.randn(1 + 5 * 24, generator=_generator())[1:].view(5, 24)
        optimizer.step()
        return dict(optimizer.state[layer.weight])

    found = run()
    assert len(fused) == 1
    with by_reference():
        assert_same(found, run())


def test_what_a_step_changes_has_its_version_raised() -> None:
    """pytorch#39141"""
    assert unraised(Case("adamw", Quantized(), FOUR, rows=11, columns=5)) == []


def test_larger_blocks_are_left_to_the_reference(fused: list[FusedStep]) -> None:
    train(Case("adamw", Quantized(block=2048), Quantized(), rows=3, columns=5, steps=1))
    assert not fused
