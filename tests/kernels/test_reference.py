"""Hashing and the sketch's tensor primitives, against plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sketch.kernels.reference import (
    gather_median,
    gather_min,
    hash_rows,
    layer_seed,
    mix64,
    over_rows,
    segment_add,
)

cases = settings(max_examples=60, deadline=None, derandomize=True, database=None)
INT64 = st.integers(-(2**63), 2**63 - 1)
SEEDS = st.integers(0, 2**63 - 1)
#: Row ids as int64 must take them: small tables, and beyond int32, float32 and float64's exact integers.
OFFSETS = [0, 2**31 - 500, 2**31, 2**40, 2**53, 2**62]

FROZEN_SEED = 4612117983613144517
FROZEN_BUCKETS = [[975, 809, 837, 263], [641, 670, 731, 269]]
FROZEN_SIGNS = [[-1, -1, -1, 1], [-1, -1, -1, 1]]


@cases
@given(x=INT64, seed=SEEDS)
def test_mix64_is_splitmix64_in_unsigned_python_integers(x, seed):
    mask = (1 << 64) - 1
    z = (x + seed * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    assert mix64(torch.tensor([x]), seed).item() & mask == z


@cases
@given(
    ids=st.lists(INT64, min_size=1, max_size=20), seed=SEEDS, depth=st.integers(1, 5), width=st.integers(1, 2**31 - 1)
)
def test_buckets_are_in_range_and_signs_are_signs(ids, seed, depth, width):
    buckets, signs = hash_rows(torch.tensor(ids), seed, depth, width)
    assert buckets.shape == signs.shape == (depth, len(ids))
    assert buckets.dtype == torch.int64
    assert int(buckets.min()) >= 0
    assert int(buckets.max()) < width
    assert set(signs.flatten().tolist()) <= {-1, 1}


@pytest.mark.parametrize("offset", OFFSETS)
def test_buckets_are_uniform_signs_balanced_and_depths_independent(offset):
    count, width, depth = 64_000, 16, 3
    buckets, signs = hash_rows(torch.arange(count) + offset, seed=5, depth=depth, width=width)
    assert _chi2(buckets[0], width) < _limit(width)
    assert signs.double().mean(dim=1).abs().max() < 5 / count**0.5
    for a in range(depth):
        for b in range(a):
            assert _chi2(buckets[a] * width + buckets[b], width**2) < _limit(width**2)  # the pair is uniform
    joint = buckets[0] * 2 + (signs[0] > 0)
    assert _chi2(joint, 2 * width) < _limit(2 * width)  # a sign says nothing about the bucket


def test_layers_hash_independently():
    width = 16
    first, second = (
        hash_rows(torch.arange(64_000), layer_seed(0, fqn), 1, width)[0][0] for fqn in ("emb.0.weight", "emb.1.weight")
    )
    assert _chi2(first * width + second, width**2) < _limit(width**2)


def test_neighbouring_seeds_do_not_share_hash_functions():
    """Depth d of one layer must not be depth d + 1 of another, for seeds made from names."""
    used = {
        layer_seed(seed, f"layers.{i}.weight") + level for seed in range(3) for i in range(500) for level in range(8)
    }
    assert len(used) == 3 * 500 * 8


def test_layer_seed_depends_on_the_seed_and_the_name_only():
    assert layer_seed(0, "a") == layer_seed(0, "a")
    assert (
        len({layer_seed(0, "a"), layer_seed(1, "a"), layer_seed(0, "b"), layer_seed(10, "a"), layer_seed(1, "0/a")})
        == 5
    )
    assert 0 <= layer_seed(2**70, "x") < 2**63


def test_rows_beyond_32_bits_do_not_alias_their_low_bits():
    low = torch.arange(4000)
    buckets = [hash_rows(low + high, 1, 1, 1 << 20)[0][0] for high in (0, 1 << 32, 1 << 40)]
    for other in buckets[1:]:
        assert (buckets[0] == other).sum() <= 3  # 4000 / 2**20 expected by chance


def test_a_bucket_depends_on_the_row_alone():
    """Not on the rows asked for with it, nor on their order: shards and sparse steps agree with dense ones."""
    ids = torch.randperm(1000)
    buckets, signs = hash_rows(torch.arange(1000), 3, 3, 50)
    some_buckets, some_signs = hash_rows(ids[:77], 3, 3, 50)
    assert torch.equal(buckets[:, ids[:77]], some_buckets)
    assert torch.equal(signs[:, ids[:77]], some_signs)


def test_the_hash_is_frozen():
    """Checkpoints hold tables, not hash functions: a changed hash would silently scramble every one of them."""
    buckets, signs = hash_rows(torch.tensor([0, 1, 2**31, 2**40]), layer_seed(0, "emb.weight"), 2, 1000)
    assert layer_seed(0, "emb.weight") == FROZEN_SEED
    assert buckets.tolist() == FROZEN_BUCKETS
    assert signs.tolist() == FROZEN_SIGNS


@pytest.mark.parametrize("tail", [(), (3,), (3, 2)])
def test_segment_add_sums_duplicates(tail):
    table, values = torch.rand(5, *tail), torch.rand(7, *tail)
    buckets = torch.tensor([0, 4, 4, 1, 0, 4, 2])
    expected = table.clone()
    for bucket, value in zip(buckets.tolist(), values, strict=True):
        expected[bucket] += 0.5 * value
    segment_add(table, buckets, 0.5 * values)
    torch.testing.assert_close(table, expected)


@pytest.mark.parametrize("tail", [(), (3,), (3, 2)])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_estimates_are_minimum_and_median_over_depth(depth, tail):
    table = torch.randn(depth, 6, *tail)
    buckets, signs = hash_rows(torch.arange(9), 1, depth, 6)
    least, middle = gather_min(table, buckets), gather_median(table, buckets, signs)
    for row in range(9):
        found = torch.stack([table[d, buckets[d, row]] for d in range(depth)])
        torch.testing.assert_close(least[row], found.amin(dim=0))
        signed = (found * signs[:, row].view(-1, *[1] * len(tail))).reshape(depth, -1)
        medians = [statistics.median(column) for column in signed.T.tolist()]
        torch.testing.assert_close(middle[row].flatten(), torch.tensor(medians))


def test_estimates_are_new_tensors():
    """Callers scale them in place; a view would scale the table."""
    table, buckets = torch.ones(1, 4, 2), torch.zeros(1, 3, dtype=torch.int64)
    gather_min(table, buckets).mul_(5)
    gather_median(table, buckets, torch.ones(1, 3, dtype=torch.int8)).mul_(5)
    assert torch.equal(table, torch.ones(1, 4, 2))


def test_over_rows_broadcasts_over_trailing_dimensions():
    assert over_rows(torch.arange(4), 1).shape == (4,)
    assert over_rows(torch.arange(4), 3).shape == (4, 1, 1)


def _chi2(values: torch.Tensor, cells: int) -> float:
    expected = values.numel() / cells
    return float(((torch.bincount(values, minlength=cells) - expected) ** 2 / expected).sum())


def _limit(cells: int) -> float:
    """Five standard deviations above the mean of chi-square with cells - 1 degrees of freedom."""
    return cells - 1 + 5 * (2 * (cells - 1)) ** 0.5
