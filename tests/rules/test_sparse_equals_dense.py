"""A sparse gradient and the same numbers as a dense one give the same parameters and states."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop, SparseAdam

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Keep, RowWise
from tests.rules.oracle import converted, everywhere, feed, sparse_gradients

OPTIMIZERS = {
    "Adam": partial(Adam, lr=0.01),
    "AdamW": partial(AdamW, lr=0.01, weight_decay=0.0),
    "SparseAdam": partial(SparseAdam, lr=0.01),
    "Adagrad": partial(Adagrad, lr=0.1),
    "RMSprop": partial(RMSprop, lr=0.01),
    "RMSprop centered, momentum": partial(RMSprop, lr=0.01, centered=True, momentum=0.9),
    "SGD": partial(SGD, lr=0.1, momentum=0.9),
    "SGD nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
}
SKETCH = CountSketch(width=7, lazy=True)
SECONDS = [SKETCH, RowWise(lazy=True), RowWise(compression=3, lazy=True), Keep(), BFloat16(), SM3(),
           SM3(variant="I"), Factored()]  # fmt: skip
FIRSTS = [SKETCH, Keep(), BFloat16()]
LINEAR = [CountSketch(width=7), RowWise(), RowWise(compression=3), Factored()]
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def _lazy(name, first, second) -> bool:
    """A layer is lazy if any of its codecs is, so one lazy state makes a test of its other one."""
    used = {"Adagrad": [second], "RMSprop": [second], "SGD": [first], "SGD nesterov": [first]}
    return any(codec.lazy for codec in used.get(name, [first, second]))


CASES = [
    pytest.param(make, first, second, id=f"{name}-{first!r}-{second!r}")
    for name, make in OPTIMIZERS.items()
    for first, second in [*((f, SKETCH) for f in FIRSTS), *((SKETCH, s) for s in SECONDS)]
    if _lazy(name, first, second)
]


@pytest.mark.parametrize(("make", "first", "second"), CASES)
def test_under_lazy_semantics(make, first, second):
    _assert_equal_runs(make, everywhere(first, second))


@pytest.mark.parametrize("second", [*LINEAR, *SECONDS[:3]], ids=repr)
@optimizers
def test_with_a_dropped_first_moment(make, second):
    """Without a first moment an absent row does not move, and a linear second moment decays it either way."""
    _assert_equal_runs(make, everywhere(Drop(), second))


def test_sparse_and_dense_gradients_may_alternate():
    make, policy = OPTIMIZERS["AdamW"], everywhere(Drop(), CountSketch(width=7))
    mixed, first = converted(make, policy)
    dense, second = converted(make, policy)
    for step in range(8):
        grads = sparse_gradients(mixed, step)
        feed(mixed, first, grads if step % 2 else [g.to_dense() for g in grads])
        feed(dense, second, [g.to_dense() for g in grads])
    torch.testing.assert_close(mixed.p0, dense.p0)


def _assert_equal_runs(make, policy) -> None:
    sparse, first = converted(make, policy)
    dense, second = converted(make, policy)
    for step in range(6):
        grads = sparse_gradients(sparse, step)  # uncoalesced, with duplicates
        feed(sparse, first, grads), feed(dense, second, [g.to_dense() for g in grads])
        torch.testing.assert_close(sparse.p0, dense.p0, rtol=1e-5, atol=1e-6)
    ours, theirs = first.state[sparse.p0], second.state[dense.p0]
    assert set(ours) == set(theirs)
    for key in ours:
        torch.testing.assert_close(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key]), rtol=1e-5, atol=1e-6)
