"""torch.optim is the oracle: the same parameters and gradients through it and through a converted optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch import CountSketch, Drop, Policy, Rule, compress, decompress

#: Every rank, one row, one column, no rows, no columns.
SHAPES = ((), (5,), (6, 4), (3, 4, 2), (3, 2, 2, 2), (1, 3), (4, 1), (0,), (0, 3), (2, 0))
WIDE = CountSketch(width=1000)  # a place for every row: exact
LAZY = CountSketch(width=1000, lazy=True)
Make = Callable[[Iterable[Tensor]], Optimizer]
#: Relative to the largest element, after 20 steps.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Params(nn.Module):
    """A model that is nothing but parameters."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(f"p{number}", nn.Parameter(value))


def everywhere(first: Any = None, second: Any = None) -> Policy:
    """One rule for all layers."""
    return Policy([Rule(first_moment=first, second_moment=second)])


def converted(make: Make, policy: Policy, shapes: Sequence[tuple[int, ...]] = ((20, 3),), **kwargs: Any) -> Any:
    """A model, and its converted optimizer."""
    model = Params(shapes, **kwargs)
    return model, compress(make(model.parameters()), model, policy)


def gradients(model: nn.Module, seed: int) -> list[Tensor]:
    """Dense gradients of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for p in model.parameters():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        found.append((g * 10 ** torch.randint(-2, 2, p.shape, generator=generator).double()).to(p.dtype))
    return found


def feed(model: nn.Module, optimizer: Optimizer, grads: Sequence[Tensor]) -> None:
    """One step with these gradients."""
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def assert_equals_torch(
    make: Make,
    policy: Policy,
    *,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    steps: int = 20,
    grads: Callable[[nn.Module, int], list[Tensor]] = gradients,
) -> None:
    """After each of some steps the parameters are torch's; after the last one the decompressed states are, too."""
    theirs = Params(shapes, dtype)
    ours = copy.deepcopy(theirs)
    stock, optimizer = make(theirs.parameters()), compress(make(ours.parameters()), ours, policy)
    assert all(record is not None for group in optimizer.param_groups for record in group["compression"])
    for step in range(steps):
        feed(theirs, stock, grads(theirs, step))
        feed(ours, optimizer, grads(theirs, step))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            _assert_close(a, b, TOLERANCE[dtype])
    decompress(optimizer)
    assert type(optimizer) is type(stock)
    dropped = {state for rule in policy.rules for state, codec in rule.codecs.items() if isinstance(codec, Drop)}
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert set(optimizer.state[a]) == set(stock.state[b])
        for key, value in stock.state[b].items():
            if not dropped and isinstance(value, Tensor) and not value.is_sparse:
                _assert_close(optimizer.state[a][key], value, TOLERANCE[dtype])


def assert_follows_float32(make: Make, policy: Policy, dtype: torch.dtype, steps: int = 20) -> None:
    """Half-precision parameters lose no more than one rounding a step against torch.optim in float32."""
    ours, optimizer = converted(make, policy, SHAPES, dtype=dtype)
    theirs = copy.deepcopy(ours).float()
    stock = make(theirs.parameters())
    for step in range(steps):
        grads = gradients(ours, step)
        feed(theirs, stock, [g.float() for g in grads]), feed(ours, optimizer, grads)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == dtype
        _assert_close(a.float(), b, steps * torch.finfo(dtype).eps / 2)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1.0, largest))


def sparse_gradients(model: nn.Module, step: int, hits: int = 8) -> list[Tensor]:
    """Row-sparse gradients as nn.Embedding makes them: uncoalesced, with duplicates, in no order."""
    generator = torch.Generator().manual_seed(1000 + step)
    found = []
    for p in model.parameters():
        rows = torch.randint(p.shape[0], (hits,), generator=generator)
        rows[-1] = rows[0]
        values = torch.randn(hits, *p.shape[1:], generator=generator, dtype=torch.float64).to(p.dtype)
        found.append(torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=True))
    return found
