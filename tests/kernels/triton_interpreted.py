"""The Triton kernels against the reference, in Triton's interpreter on CPU tensors.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    RowWise,
    Rule,
    compress,
    kernels,
)
from lightning_sketch.codecs.bfloat16 import stochastic_round
from lightning_sketch.kernels.reference import hash_rows, signed
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.kernels.triton import launch, launches, layout
from lightning_sketch.kernels.triton.bits import bucket_of, narrow, narrow_stochastically
from lightning_sketch.kernels.triton.jit import kernel
from tests.kernels.fused_cases import FIRST, PAIRS, RULES, SECOND, Case, by_reference, check, train, unraised


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FusedStep]]:
    """Have every step done by the Triton kernels, and see which."""
    seen: list[FusedStep] = []

    def step(steps: list[FusedStep]) -> Tensor:
        seen.extend(steps)
        return launch.step(steps)

    monkeypatch.setattr(kernels, "fused_kernel", lambda device: step)
    return seen


#: By turns dense and sparse gradients. Of first moments there are seven, so that every codec has both.
BY_TURNS = [pytest.param(*pair.values, bool(i % 2), id=f"{pair.id}-{i % 2}") for i, pair in enumerate(PAIRS)]


@pytest.mark.parametrize(("second", "first", "sparse"), BY_TURNS)
def test_every_pair_of_codecs_under_adam(second: Codec, first: Codec, sparse: bool, fused: list[FusedStep]) -> None:
    check(Case("adamw", second, first, rows=13, columns=11, sparse=sparse, steps=2))
    assert len(fused) == 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("second", [RowWise(), SM3(), CountSketch(compression=3), BFloat16(), Factored()], ids=repr)
def test_every_rule(rule: str, second: Codec, fused: list[FusedStep]) -> None:
    """By turns in float32 and bfloat16, of which every rule and every codec has both."""
    first = BFloat16() if rule in ("sgd", "nesterov") else Drop()
    number = list(RULES).index(rule) + [RowWise, SM3, CountSketch, BFloat16, Factored].index(type(second))
    dtype = (torch.float32, torch.bfloat16)[number % 2]
    check(Case(rule, second, first, rows=11, columns=17, sparse=rule == "sparse_adam", dtype=dtype, steps=2))
    assert len(fused) == 2


#: One pair for every way through the kernels.
WAYS: list[tuple[Codec, Codec]] = [
    (RowWise(), BFloat16()),
    (RowWise(compression=4), Drop()),
    (SM3(), Drop()),
    (Factored(floor=2.0), BFloat16()),
    (CountSketch(compression=4), CountSketch(compression=4)),
    (BFloat16(), BFloat16(stochastic=False)),
    (CountSketch(width=10_000), Keep()),
]


@pytest.mark.parametrize(("second", "first"), WAYS, ids=repr)
def test_sizes(second: Codec, first: Codec, fused: list[FusedStep]) -> None:
    """One step of layers of many sizes, all in one call."""
    sizes = [(10_000, 1), (1, 4096), (3, 1000), (7, 300), (40, 64), (9, 50)]

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        model = nn.ModuleList(nn.Embedding(*size, _weight=torch.randn(size, generator=generator)) for size in sizes)
        policy = Policy([Rule(name="*", first_moment=first, second_moment=second)])
        optimizer = compress(torch.optim.AdamW(model.parameters()), model, policy)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        return [param.detach() for param in model.parameters()]

    found = run()
    assert len(fused) == len(sizes)
    with by_reference():
        for one, other in zip(found, run(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("second", "first"), WAYS, ids=repr)
def test_what_a_step_changes_has_its_version_raised(second: Codec, first: Codec) -> None:
    """pytorch#39141"""
    assert unraised(Case("adamw", second, first, rows=11, columns=5)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_momentum_of_sm3(momentum: float, dtype: torch.dtype, fused: list[FusedStep]) -> None:
    check(Case("adagrad", SM3(momentum=momentum), Drop(), rows=23, columns=33, dtype=dtype))
    assert all(step.momentum is not None for step in fused)


@settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rule=st.sampled_from(["adamw", "adam", "adagrad"]),
    second=st.sampled_from(list(SECOND.values())),
    first=st.sampled_from(list(FIRST.values())),
    # Rows wider than a tile are few: each of their tiles is a program, and the interpreter runs one after the other.
    shape=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 3), st.sampled_from([1023, 2050])),
    ),
    sparse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    rule: str, second: Codec, first: Codec, shape: tuple[int, int], sparse: bool, dtype: torch.dtype
) -> None:
    if sparse and rule != "adamw":
        rule = "adamw"  # torch's own classes refuse the others' weight decay under sparse gradients
    if second == first == Keep() or (rule == "adagrad" and second == Keep()):
        second = RowWise()
    check(Case(rule, second, first, *shape, sparse, dtype, steps=2))


@pytest.mark.parametrize(
    ("second", "first"),
    [
        ("RowWise", "CountSketch"),
        ("RowWise sketched", "BFloat16"),
        ("SM3", "BFloat16"),
        ("Factored", "Drop"),
        ("CountSketch", "CountSketch"),
        ("BFloat16", "Keep"),
    ],
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_parts_of_large_layers(second: str, first: str, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this small layer were large: waves of rows, rows wider than a tile, several programs for the same rows."""
    small = {"TILE": 64, "TILE_COLUMNS": 16, "LINE_BYTES": 64, "WIDEST_ROW": 16, "SPAN": 32, "WAVE": 16}
    small |= {"OBSERVED_COLUMNS": 16, "INSERTED_COLUMNS": 16, "INSERTED_SLOTS": 4, "FEWER_OBSERVED_ROWS": 8}
    for name, value in small.items():
        monkeypatch.setattr(layout, name, value)
    for name in ("SPAN", "TILE_COLUMNS"):
        monkeypatch.setattr(launches, name, getattr(layout, name))
    check(Case("adamw", SECOND[second], FIRST[first], 11, 37, sparse, steps=2))


def test_many_rows_in_few_buckets_and_in_many() -> None:
    for compression in (2, 30):  # several buckets, and one with every row
        codec = CountSketch(compression=compression)
        check(Case("adamw", codec, codec, rows=24, columns=15, steps=2))
        check(Case("adamw", codec, CountSketch(compression=compression, depth=5), rows=24, columns=7, steps=2))


@pytest.mark.parametrize("depth", range(1, 9))
def test_medians_of_every_depth(depth: int, fused: list[FusedStep]) -> None:
    check(Case("adamw", RowWise(), CountSketch(compression=2, depth=depth), rows=32, columns=3, steps=2))
    assert len(fused) == 2


def test_empty_layers_and_gradients_and_single_rows(fused: list[FusedStep]) -> None:
    for rows, columns in ((0, 4), (4, 0), (1, 1), (1, 1030)):
        for second in SECOND.values():
            check(Case("adamw", second, BFloat16(), rows, columns, steps=1))
    layer = nn.Embedding(5, 3, sparse=True)
    policy = Policy([Rule(name="*", exp_avg_sq=RowWise())])
    optimizer = compress(torch.optim.SparseAdam(layer.parameters()), layer, policy)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3), (5, 3))
    optimizer.step()
    assert torch.equal(before, layer.weight)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_noise_of_stochastic_rounding_is_that_of_the_reference(sparse: bool, dtype: torch.dtype) -> None:
    """Bit for bit: the first value of an average, a product, is the same number before it is rounded."""
    # Several tiles of rows, wider than the 128 columns of others.
    case = Case("adamw", RowWise(), BFloat16(), rows=18, columns=140, sparse=sparse, dtype=dtype, steps=1)
    found = train(case)["exp_avg"]
    with by_reference():
        expected = train(case)["exp_avg"]
    assert isinstance(found, Tensor)
    assert found.count_nonzero()
    assert torch.equal(found, expected)


def _step_rows(second: Codec, touched: list[list[int]], eps: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A table of 6 x 5 ones after a sparse step of each list of rows, with gradients 0, 1, 2, ...; its states."""
    layer = nn.Embedding(6, 5, sparse=True)
    nn.init.ones_(layer.weight)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, eps=eps, weight_decay=0.0)
    compress(optimizer, layer, Policy([Rule(name="*", first_moment=Drop(), second_moment=second)]))
    for number, rows in enumerate(touched):
        values = torch.arange(len(rows)).float()[:, None].expand(-1, 5) / (1 + 9 * number)
        layer.weight.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, (6, 5), check_invariants=True)
        optimizer.step()
    return layer.weight.detach(), dict(optimizer.state[layer.weight])


@pytest.mark.parametrize("second", [RowWise(), SM3(), Factored(), BFloat16(), CountSketch(width=20)], ids=repr)
def test_rows_without_gradients_stay_even_without_eps(second: Codec) -> None:
    weight, _ = _step_rows(second, [[0, 1, 2]], eps=0.0)
    assert torch.equal(weight[0], torch.ones(5))
    assert torch.allclose(weight[1:3], torch.full((2, 5), 0.9), atol=0.08)


def test_rows_that_are_absent_still_bound_the_columns_of_sm3() -> None:
    touched = [[0, 1, 2], [3, 4, 5]]  # of the second step, smaller gradients
    _, found = _step_rows(SM3(), touched, eps=1e-8)
    with by_reference():
        _, expected = _step_rows(SM3(), touched, eps=1e-8)
    for name in ("exp_avg_sq_dim0", "exp_avg_sq_dim1"):
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("rows", [1, 3, 1030])
def test_vectors_have_no_columns_to_be_bounded_by(rows: int, fused: list[FusedStep]) -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        layer = nn.LayerNorm(rows)
        policy = Policy([Rule(name="*", exp_avg=BFloat16(), exp_avg_sq=SM3())])
        optimizer = compress(torch.optim.AdamW(layer.parameters()), layer, policy)
        for parameter in layer.parameters():
            parameter.grad = torch.randn(rows)
        optimizer.step()
        return torch.cat([parameter.detach() for parameter in layer.parameters()])

    found = run()
    assert len(fused) == 2
    with by_reference():
        torch.testing.assert_close(found, run(), rtol=1e-6, atol=1e-7)


def test_many_layers_in_one_call(fused: list[FusedStep]) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
        rules = [
            Rule(name="0.weight", exp_avg=CountSketch(width=2), exp_avg_sq=Factored()),
            Rule(name="1.weight", exp_avg=BFloat16(), exp_avg_sq=SM3()),
            Rule(name="*", exp_avg=Drop(), exp_avg_sq=RowWise()),
        ]
        optimizer = compress(torch.optim.AdamW(model.parameters()), model, Policy(rules))
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    found = run()
    assert len(fused) == 10
    with by_reference():
        torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-6)


@kernel()
def _round(
    x: tl.tensor, noise: tl.tensor, nearest: tl.tensor, stochastic: tl.tensor, count: tl.int32, TILE: tl.constexpr
) -> None:
    at = tl.arange(0, TILE)
    value = tl.load(x + at, mask=at < count, other=0.0)
    bits = tl.load(noise + at, mask=at < count, other=0).to(tl.uint32, bitcast=True)
    tl.store(nearest + at, narrow(value), mask=at < count)
    tl.store(stochastic + at, narrow_stochastically(value, bits), mask=at < count)


def test_roundings_are_those_of_torch() -> None:
    special = torch.tensor([0, 0x7F800000, 0x7FC00000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3FFFFFFF, 1])
    patterns = torch.cat([special, special | -(1 << 31), torch.randint(-(1 << 31), 1 << 31, (4000,))])
    x = patterns.to(torch.int32).view(torch.float32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32)
    nearest, stochastic = torch.empty(2, len(x), dtype=torch.int16)
    _round[(1,)](x, noise, nearest, stochastic, len(x), TILE=8192)
    for found, expected in ((nearest, x.bfloat16()), (stochastic, stochastic_round(x, noise))):
        torch.testing.assert_close(found.view(torch.bfloat16), expected, rtol=0, atol=0, equal_nan=True)


@kernel("count", "seed", "level", "width", "row_offset")
def _hash(
    ids: tl.tensor,
    buckets: tl.tensor,
    signs: tl.tensor,
    count: tl.int64,
    seed: tl.int64,
    level: tl.int64,
    width: tl.int64,
    row_offset: tl.int64,
    TILE: tl.constexpr,
) -> None:
    at = tl.arange(0, TILE)
    row_id = (tl.load(ids + at, mask=at < count, other=0) + row_offset).to(tl.uint64)
    bucket, sign = bucket_of(row_id, seed.to(tl.uint64), level, width)
    tl.store(buckets + at, bucket, mask=at < count)
    tl.store(signs + at, sign, mask=at < count)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -3])
def test_hashes_are_those_of_the_reference(seed: int) -> None:
    ids = torch.cat([torch.arange(40), torch.randint(0, 1 << 40, (40,))])
    expected, signs = hash_rows(ids + 7, seed, 3, 1000)
    for level in range(3):
        buckets, found = torch.empty(80, dtype=torch.int64), torch.empty(80)
        _hash[(1,)](ids, buckets, found, 80, signed(seed), level, 1000, 7, TILE=128)
        assert torch.equal(buckets, expected[level])
        assert torch.equal(found, signs[level].float())
