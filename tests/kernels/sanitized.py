"""Steps of the compiled kernels that touch every kind of memory, for the sanitizers. Run by test_sanitizers.py.

Nothing is compared: other tests do, with more and larger cases. Here every read and write is looked at, so cases are
small, and chosen by the ways through the kernels: codecs, rules, dtypes, tails of vectors, unaligned memory, numbers of
threads, rows that are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
)
from lightning_sketch.kernels.coalesce import coalesce
from lightning_sketch.sharding import Shard
from tests.kernels import fused_cases
from tests.kernels.fused_cases import QUANTIZED, RULES, Case, pairs, threads, train
from tests.kernels.test_left_out import PAIRS, bad_elements, part, spoiled
from tests.rules.left_out import values_like

SECOND, FIRST = fused_cases.SECOND | QUANTIZED, fused_cases.FIRST | QUANTIZED
DTYPES = (torch.float32, torch.bfloat16)
OF_RULES: tuple[Codec, ...] = (RowWise(), SM3(), CountSketch(compression=3), BFloat16(), Quantized(), Factored())
SKETCHES = [CountSketch(compression=4, depth=depth) for depth in (1, 2, 3)]
#: Wide enough that no bucket has many rows, which are inserted in another way.
SCATTERED: list[tuple[Codec, Codec]] = [
    (CountSketch(width=900), CountSketch(width=900)),
    (CountSketch(width=900), CountSketch(width=510, depth=4)),
    (CountSketch(width=700, depth=1), Drop()),
    (RowWise(compression=4, depth=5), CountSketch(width=900, depth=1)),
    (Factored(), CountSketch(width=900)),
    (CountSketch(width=880, depth=8), CountSketch(width=880, depth=8)),
]


@pytest.fixture(autouse=True, params=[1, 3], ids="{0} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.param):
        yield


def test_every_pair_of_codecs() -> None:
    for number, pair in enumerate(pairs(SECOND, FIRST)):
        for sparse in (False, True):
            dtype = DTYPES[number % 2]
            train(Case("adamw", *pair.values, rows=37, columns=19 + number % 16, sparse=sparse, dtype=dtype, steps=2))


def test_every_rule() -> None:
    for rule, second, dtype in itertools.product(RULES, OF_RULES, DTYPES):
        stored = second if isinstance(second, Quantized) else BFloat16()
        first = stored if rule in ("sgd", "nesterov") else Drop()
        train(Case(rule, second, first, rows=9, columns=33, sparse=rule == "sparse_adam", dtype=dtype, steps=2))
    train(Case("adagrad", SM3(momentum=0.9), Drop(), rows=9, columns=33, steps=2))


@pytest.mark.parametrize("rows", [0, 1, 2, 23])
def test_every_tail_of_a_row(rows: int) -> None:
    for columns in (0, 1, 15, 16, 17, 31, 64, 65, 129, 1040):
        for second in (RowWise(), SM3(), Factored(), Quantized(bits=4, block=16), BFloat16(), CountSketch(4)):
            train(Case("adamw", second, Quantized(), rows, columns, dtype=DTYPES[columns % 2], steps=1))


def test_memory_that_is_not_aligned() -> None:
    for second, shift in itertools.product((*OF_RULES, RowWise(compression=3)), (1, 3)):
        layer = nn.Linear(205, 40, bias=False)
        layer.weight.data = torch.randn(40 * 205 + shift)[shift:].view(40, 205)
        first = second if second == CountSketch(compression=3) else BFloat16()
        policy = Policy([Rule(name="*", exp_avg=first, exp_avg_sq=second)])
        optimizer = compress(torch.optim.AdamW(layer.parameters()), layer, policy)
        layer.weight.grad = torch.randn(40 * 205 + 2)[2:].view(40, 205)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3_000, 3), (40, 1029), (2, 5_000), (150, 300)], ids=str)
def test_rows_that_are_left_out(shape: tuple[int, int]) -> None:
    finite, bad = values_like(Shard.whole(shape), 1), bad_elements(shape)
    for pair in PAIRS:
        found = part(pair, shape)
        found.step(finite)
        assert found.step(spoiled(finite, bad)) > 0
        ids = torch.arange(0, shape[0], 2)
        found.step(finite[ids], ids)


def test_many_rows_in_few_buckets_and_elements_in_lines() -> None:
    for compression in (2, 30):
        codec = CountSketch(compression=compression)
        train(Case("adamw", codec, codec, rows=200, columns=70, steps=2))
        train(Case("adamw", codec, CountSketch(compression=compression, depth=5), rows=200, columns=70, steps=2))
    for dtype in DTYPES:
        train(Case("adamw", CountSketch(width=20_000), fused_cases.FIRST["Keep"], 5_000, 1, dtype=dtype, steps=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strips_of_dense_sketches(dtype: torch.dtype) -> None:
    for codec, columns in itertools.product(SKETCHES, (128, 205, 900)):
        for first in (codec, Drop()):
            train(Case("adam", codec, first, rows=60, columns=columns, dtype=dtype, steps=2))


@pytest.mark.parametrize("columns", [3, 33])
def test_scattered_rows(columns: int) -> None:
    for number, (second, first) in enumerate(SCATTERED):
        train(Case("adam", second, first, 900, columns, sparse=True, dtype=DTYPES[number % 2], steps=2))


def test_sums_of_sparse_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    for most, columns, dtype in itertools.product((1, 100, 1 << 22, 1 << 32), (1, 7, 16, 33, 1030), DTYPES):
        ids = torch.randint(0, most, (150,), generator=generator)
        coalesce(ids, torch.randn(150, columns, generator=generator).to(dtype))
    ids: Tensor = torch.tensor([3, 0, 3, 3])
    for values in (torch.randn(4, 2, 5), torch.randn(4), torch.ones(1, 6).expand(4, 6), torch.empty(4, 0)):
        coalesce(ids, values)
    coalesce(torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    coalesce((torch.rand(20_000, generator=generator).pow(3) * 50_000).long(), torch.randn(20_000, 4))
