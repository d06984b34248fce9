"""Bugs found in other implementations of these ideas. Each test fails on the code it was found in."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop, SparseAdam

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, RowWise, compress, plan, report
from lightning_sketch.kernels.reference import hash_rows
from tests.kernels.fused_cases import threads
from tests.profiled import live_bytes
from tests.rules.oracle import Params, everywhere

SECONDS = [CountSketch(width=3), CountSketch(width=1000), CountSketch(width=3, update="paper"), SM3(), SM3(variant="I"),
           RowWise(), RowWise(compression=4), Factored(), BFloat16()]  # fmt: skip
FIRSTS = [CountSketch(width=3), BFloat16(), Drop()]
second_moments = pytest.mark.parametrize("second", SECONDS, ids=repr)


def _optimizer(make, shape, first=None, second=None, dtype=torch.float32, **options):
    model = Params([shape], dtype)
    return model.p0, compress(make(model.parameters(), **options), model, everywhere(first, second))


def _sparse(rows, values, shape):
    return torch.sparse_coo_tensor([rows], values, shape)


# --- shapes: kernels that floor to multiples of 32, or allow 1024 columns at most; crashes on scalars ---


@pytest.mark.parametrize("dim", [1, 31, 33, 1025])
@second_moments
def test_every_column_is_updated_whatever_their_number(second, dim):
    w, optimizer = _optimizer(partial(Adam, lr=0.5), (12, dim), Drop(), second)
    before = w.detach().clone()
    w.grad = _sparse([4], torch.full((1, dim), 3.0), w.shape)  # one row: nothing collides
    optimizer.step()
    torch.testing.assert_close((before - w.detach())[4], torch.full((dim,), 0.5), rtol=1e-2, atol=0)  # bfloat16's ulp
    w.grad = torch.full((12, dim), 3.0)
    before = w.detach().clone()
    optimizer.step()
    assert bool((before - w.detach() > 0.01).all())


@pytest.mark.parametrize("make", [Adam, AdamW, Adagrad, RMSprop, partial(SGD, lr=0.1, momentum=0.9)], ids=str)
@second_moments
def test_scalars_train(make, second):
    w, optimizer = _optimizer(make, (), BFloat16(), second)
    before = w.item()
    w.grad = torch.tensor(2.0)
    optimizer.step()
    assert w.item() < before


def test_frozen_and_unused_parameters_are_no_trouble():
    model = Params([(4, 2), (4, 2), (4, 2)])
    model.p1.requires_grad_(False)
    optimizer = compress(Adagrad(model.parameters()), model, everywhere(second=SM3()))
    before = [p.detach().clone() for p in model.parameters()]
    model.p0.grad = torch.ones(4, 2)
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)] == [False, True, True]


def test_tables_beyond_2_to_the_31_elements():
    """Sizes and row ids are 64-bit. Nothing of this is allocated."""
    rows = 3 * 2**31
    model = nn.Embedding(rows, 16, device="meta")
    policy = everywhere(Drop(), CountSketch(compression=100, depth=1))
    (layer,) = plan(model, AdamW(model.parameters()), policy).layers
    assert layer.bytes_after == {"exp_avg": 0, "exp_avg_sq": -(-rows // 100) * 16 * 4 + 8}  # and the scale
    buckets, _ = hash_rows(torch.tensor([rows - 1, rows - 1 - 2**32, 2**31, 0]), 1, 1, 2**31 - 1)
    assert buckets.unique().numel() == 4
    assert bool((buckets >= 0).all())


# --- memory: dead momentum buffers, dense states that stay behind, tables that nobody sees ---


@pytest.mark.parametrize("make", [Adagrad, RMSprop, partial(RMSprop, momentum=0)], ids=str)
def test_no_momentum_allocates_nothing(make):
    w, optimizer = _optimizer(make, (1000, 500), None, SM3())
    w.grad = torch.ones(1000, 500)
    optimizer.step()
    assert report(optimizer).state == 4 + 4 * (1000 + 500) + 8  # the step count, rows, columns, scale


def test_a_dropped_momentum_allocates_nothing():
    w, optimizer = _optimizer(partial(SGD, lr=0.1, momentum=0.9), (100, 5), Drop())
    w.grad = torch.ones(100, 5)
    optimizer.step()
    assert set(optimizer.state[w]) == {"step"}


def test_adagrads_eager_dense_sum_is_freed():
    w, optimizer = _optimizer(Adagrad, (100, 5), None, RowWise())
    assert set(optimizer.state[w]) == {"step", "sum_row", "sum_scale"}


@pytest.mark.parametrize("first", FIRSTS, ids=repr)
@second_moments
def test_every_state_is_a_tensor_in_the_state_dict(first, second):
    w, optimizer = _optimizer(AdamW, (40, 5), first, second)
    w.grad = torch.randn(40, 5)
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]
    assert saved.keys() == optimizer.state[w].keys()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    held = sum(value.nbytes for value in saved.values())
    assert held == report(optimizer).state
    assert saved["step"].item() == 1


# --- checkpoints: states cast to the parameter's dtype on load, pickled objects ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("first", FIRSTS, ids=repr)
@second_moments
def test_resuming_keeps_dtype_and_bytes_and_continues_bit_for_bit(first, second, dtype):
    make = partial(AdamW, lr=0.01)
    w, optimizer = _optimizer(make, (40, 5), first, second, dtype)
    _train(w, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"w": w.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    again, resumed = _optimizer(make, (40, 5), first, second, dtype)
    resumed.load_state_dict(checkpoint["optimizer"])
    for key, value in optimizer.state[w].items():
        found = resumed.state[again][key]
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(value))
        assert not isinstance(value, torch.Tensor) or found.dtype == value.dtype
    with torch.no_grad():
        again.copy_(checkpoint["w"])
    _train(w, optimizer, range(3, 6)), _train(again, resumed, range(3, 6))
    assert torch.equal(w, again)


def _train(w, optimizer, steps):
    for step in steps:
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(step)).to(w.dtype)
        optimizer.step()


# --- sparse gradients: duplicates, absent rows, weight decay ---


@pytest.mark.parametrize("second", [SM3(), RowWise(), CountSketch(width=1000)], ids=repr)
def test_duplicate_rows_are_summed_before_they_are_squared(second):
    """(1 + 1)^2 = 4, not 1 + 1."""
    w, optimizer = _optimizer(partial(Adagrad, lr=1.0), (6, 4), None, second)
    w.grad = _sparse([2, 2], torch.ones(2, 4), (6, 4))
    optimizer.step()
    state = optimizer.state[w]
    kept = next(state[key] for key in ("sum_dim0", "sum_row", "sum_table") if key in state).reshape(6, -1)
    assert kept[:, 0].tolist() == [0, 0, 4, 0, 0, 0]


@pytest.mark.parametrize("second", [SM3(), SM3(variant="I"), RowWise(), CountSketch(width=1000)], ids=repr)
def test_absent_rows_are_not_erased(second):
    """Five hits on row 1, then one on row 3."""
    w, optimizer = _optimizer(Adagrad, (6, 4), None, second)
    for row in [1] * 5 + [3]:
        w.grad = _sparse([row], torch.ones(1, 4), (6, 4))
        optimizer.step()
    state = optimizer.state[w]
    kept = next(state[key] for key in ("sum_dim0", "sum_row", "sum_table") if key in state).reshape(6, -1)
    assert kept[:, 0].tolist() == [0, 5, 0, 1, 0, 0]


@pytest.mark.parametrize("make", [Adam, AdamW, Adagrad, RMSprop, partial(SGD, lr=0.1, momentum=0.9)], ids=str)
def test_weight_decay_under_sparse_gradients_is_not_dense(make):
    """Untouched rows stay bit for bit; touched ones feel it. (Others raise, or make a dense gradient of it.)"""
    moved = []
    for weight_decay in (0.0, 0.5):
        w, optimizer = _optimizer(partial(make, weight_decay=weight_decay), (50, 4), BFloat16(), RowWise())
        before = w.detach().clone()
        for _ in range(3):
            w.grad = _sparse([7, 3, 7], torch.full((3, 4), 0.1), (50, 4))
            optimizer.step()
        changed = (w != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == [3, 7]
        moved.append(w.detach() - before)
    assert not torch.equal(*moved)


# --- numbers: eps, decay, dividing by nothing, shared hashes ---


@pytest.mark.parametrize("second", [s for s in SECONDS if getattr(s, "update", "") != "paper"], ids=repr)
def test_an_ema_decays(second):
    """A spike of 0.5, then fifty tiny gradients: a running maximum would remember it for ever."""
    w, optimizer = _optimizer(partial(RMSprop, lr=1.0, alpha=0.5, eps=0.0), (6, 4), None, second)
    for step in range(51):
        w.grad = torch.full((6, 4), 0.5 if step == 0 else 1e-5)
        before = w.detach().clone()
        optimizer.step()
    share = 2 if isinstance(second, CountSketch) or getattr(second, "compression", 1) > 1 else 1  # rows in a bucket
    assert bool((before - w.detach() > 0.3 / share).all())


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8])
@second_moments
def test_small_gradients_are_not_muted(second, size):
    """eps belongs outside of the square root: inside it, 1e-8 mutes every gradient below 1e-4."""
    w, optimizer = _optimizer(partial(Adagrad, lr=1.0, eps=1e-10), (6, 4), None, second)
    before = w.detach().double()
    w.grad = _sparse([2], torch.full((1, 4), size), (6, 4))
    optimizer.step()
    step = before[2] - w[2].detach().double()
    assert step.min() > 0.98


@second_moments
def test_the_users_eps_is_respected(second):
    w, optimizer = _optimizer(partial(Adam, lr=1.0, eps=3.0), (6, 1), Drop(), second)
    before = w.detach().clone()
    w.grad = _sparse([2], torch.full((1, 1), 2.0), (6, 1))
    optimizer.step()
    torch.testing.assert_close((before - w.detach())[2], torch.tensor([2 / (2 + 3)]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("first", FIRSTS[:2], ids=repr)
@pytest.mark.parametrize("second", [RowWise(), SM3(), Factored(), CountSketch(width=3)], ids=repr)
def test_a_first_moment_without_a_second_one_moves_nothing(first, second):
    """What an approximate m holds where v = 0 is noise; divided by eps it was 2.5e5 learning rates."""
    w, optimizer = _optimizer(AdamW, (12, 4), first, second)
    w.grad = torch.zeros(12, 4)
    optimizer.step()
    next(t for key, t in optimizer.state[w].items() if key in ("exp_avg", "exp_avg_table")).fill_(1.0)
    before = w.detach().clone()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert torch.equal(w, before)


@pytest.mark.parametrize("make", [AdamW, SparseAdam], ids=str)
def test_colliding_rows_never_leap(make):
    """Both moments share their hashes, so a bucket that holds another row's m holds its v, too."""
    sketch = CountSketch(compression=20)
    w, optimizer = _optimizer(partial(make, lr=1.0), (2000, 2), sketch, sketch)
    largest = 0.0
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(2000, (20,), generator=generator).tolist()
        w.grad = _sparse(rows, torch.randn(20, 2, generator=generator), w.shape)
        before = w.detach().clone()
        optimizer.step()
        largest = max(largest, float((w.detach() - before).abs().max()))
    assert largest < 20


def test_layers_do_not_share_their_collisions():
    """One hash for all layers means that the same rows collide everywhere."""
    model = Params([(400, 1), (400, 1)])
    optimizer = compress(Adagrad(model.parameters()), model, everywhere(second=CountSketch(width=20, depth=1)))
    tables = []
    for p in model.parameters():
        p.grad = _sparse(list(range(10)), torch.arange(1.0, 11.0)[:, None], (400, 1))
    optimizer.step()
    for p in model.parameters():
        tables.append(optimizer.state[p]["sum_table"])
    assert not torch.equal(*tables)


def test_nothing_is_cleaned_behind_the_users_back():
    assert (CountSketch().cleaning_interval, CountSketch().cleaning_factor) == (0, 1.0)


@second_moments
def test_equal_runs_are_equal_bit_for_bit(second):
    """No atomics, no races, no generator."""
    runs = []
    for _ in range(2):
        w, optimizer = _optimizer(AdamW, (40, 5), BFloat16(), second)
        _train(w, optimizer, range(4))
        runs.append(w.detach())
        torch.rand(7)
    assert torch.equal(*runs)


# --- the step's temporaries ---

STEPS = [
    (CountSketch(), CountSketch()), (CountSketch(depth=7), CountSketch(depth=7)), (CountSketch(lazy=True),) * 2,
    (CountSketch(update="paper"), CountSketch(update="paper")), (BFloat16(), SM3()), (BFloat16(), SM3(variant="I")),
    (Drop(), SM3(momentum=0.9)), (Drop(), RowWise()), (BFloat16(), RowWise(compression=10)), (Drop(), Factored()),
]  # fmt: skip


@pytest.mark.parametrize("dim", [1, 64])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("first", "second"), STEPS, ids=repr)
def test_the_reported_transient_bounds_the_measured_one(first, second, sparse, dim):
    w, optimizer = _optimizer(AdamW, (2**18 // dim, dim), first, second)
    w.grad = _some_rows(w, 3000) if sparse else torch.ones_like(w)
    assert 0 < _measured_transient(optimizer) <= report(optimizer).transient + 4096


def test_the_reported_transient_bounds_that_of_strips():
    sketch = CountSketch(compression=5)  # large: the columns of a strip are more than all else that kernels ask for
    w, optimizer = _optimizer(AdamW, (20_000, 200), sketch, sketch)
    w.grad = torch.ones_like(w)
    assert 2_000_000 < _measured_transient(optimizer) <= report(optimizer).transient + 4096 < 4_000_000


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("second", [Factored(), RowWise(compression=4), SM3()], ids=repr)
def test_the_reported_transient_bounds_that_of_sums_and_of_threads(second, count):
    w, optimizer = _optimizer(Adam, (40_000, 4), Drop(), second, weight_decay=0.1)
    w.grad = torch.ones_like(w)
    with threads(count):
        assert 0 < _measured_transient(optimizer) <= report(optimizer).transient + 4096


@pytest.mark.parametrize("depth", [1, 8])
def test_the_reported_transient_bounds_that_of_hashes(depth):
    """Of scattered rows, more of them than fall into their places by bucket."""
    w, optimizer = _optimizer(AdamW, (200_000, 1), CountSketch(depth=depth), CountSketch(3, depth=depth))
    w.grad = _some_rows(w, 60_000)
    assert 60_000 * 4 * depth < _measured_transient(optimizer) <= report(optimizer).transient + 4096


@pytest.mark.parametrize(("first", "second"), STEPS, ids=repr)
def test_a_sparse_step_costs_the_same_in_a_table_a_hundred_times_larger(first, second):
    transients = []
    for rows in (2000, 200_000):
        w, optimizer = _optimizer(AdamW, (rows, 8), first, second)
        w.grad = _some_rows(w, 500)
        transients.append(_measured_transient(optimizer))
    assert transients[1] <= transients[0] * 1.2 < 200_000 * 4


@pytest.mark.parametrize(("first", "second"), [s for s in STEPS if not s[0].lazy], ids=repr)
def test_a_dense_step_costs_a_number_and_a_byte_for_each_row_at_most_in_a_table_twice_as_large(first, second):
    means = 4 * 2**14 if isinstance(second, Factored) or getattr(second, "compression", 1) == 10 else 0
    left_out = 2**14 if means or getattr(second, "update", "") == "linear" else 0  # a byte: whether a row is
    transients = []
    for rows in (2**14, 2**15):  # four and eight blocks
        w, optimizer = _optimizer(AdamW, (rows, 64), first, second)
        w.grad = torch.ones_like(w)
        transients.append(_measured_transient(optimizer))
    assert transients[1] <= transients[0] + means + left_out + 4096


def _some_rows(w, count):
    rows = torch.randint(w.shape[0], (1, count))
    return torch.sparse_coo_tensor(rows, torch.randn(count, w.shape[1]), w.shape)


def _measured_transient(optimizer) -> int:
    """Largest sum of live allocations within a step, bytes; the state exists already."""
    optimizer.step()
    live_bytes(optimizer.step)  # of what was kept before its first session, the profiler does not see when it is freed
    found = live_bytes(optimizer.step)
    assert found[-1] == 0  # a step leaves nothing behind
    return max(found)
