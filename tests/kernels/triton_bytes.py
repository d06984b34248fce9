"""Bytes of memory that each Triton kernel touches for an element, counted in the interpreter.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported. Counted is every
address once for each launch, as a cache that holds all but tensors of the parameter's shape would have it; and how
often the gradient is read, which no cache would hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from lightning_sketch import (
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
    kernels,
)
from lightning_sketch.kernels.triton import launch
from lightning_sketch.kernels.triton.layout import FEWER_OBSERVED_ROWS

ROWS, COLUMNS = 64, 512
#: Of kernels that only see numbers of rows and columns, all together.
SMALL = 0.5


@dataclass
class Touched:
    """Addresses of one launch.

    Args:
        size: of each address, bytes.
        gradient: how many elements of the gradient were read.
    """

    loaded: dict[int, list[Any]] = field(default_factory=dict)
    stored: dict[int, list[Any]] = field(default_factory=dict)
    gradient: int = 0

    def bytes(self) -> int:
        return sum(
            size * len(np.unique(np.concatenate(found)))
            for by_size in (self.loaded, self.stored)
            for size, found in by_size.items()
        )


Launches = dict[str, Touched]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> tuple[Launches, list[range]]:
    """What kernels touch, by name, and where the gradient lies."""
    found: Launches = {}
    gradient: list[range] = []
    now: list[Touched] = []
    call, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[:] = [found.setdefault(self.fn.__name__, Touched())]
        return call(self, *args, **kwargs)

    def addresses(pointers: Any, mask: Any) -> Any:
        return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel()

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        size, at = pointers.get_element_ty().primitive_bitwidth // 8, addresses(pointers, mask)
        now[0].loaded.setdefault(size, []).append(at)
        now[0].gradient += sum(int(((at >= where.start) & (at < where.stop)).sum()) for where in gradient)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = value.dtype.scalar.primitive_bitwidth // 8
        now[0].stored.setdefault(size, []).append(addresses(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", called)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loaded)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stored)
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: launch.step)
    return found, gradient


def _step(second: Codec, first: Codec, dtype: torch.dtype, gradient: list[range]) -> None:
    model = nn.Embedding(ROWS, COLUMNS, dtype=dtype)
    policy = Policy([Rule(role="embedding", first_moment=first, second_moment=second)])
    optimizer = compress(torch.optim.AdamW(model.parameters()), model, policy, nonfinite="propagate")
    model.weight.grad = torch.randn_like(model.weight)
    gradient[:] = [range(model.weight.grad.data_ptr(), model.weight.grad.data_ptr() + model.weight.grad.nbytes)]
    optimizer.step()


#: Bytes of a parameter and a gradient (read, read and written) are 12 in float32; of states, read and written, these.
STATES = [
    (RowWise(compression=10), Drop(), 0.0),
    (Factored(), Drop(), 0.0),
    (RowWise(), Drop(), 0.0),
    (Factored(), BFloat16(), 4.0),
    (BFloat16(), BFloat16(), 8.0),
    (Quantized(), Quantized(), 4 + 2 * 8 / 128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("second", "first", "states"), STATES, ids=repr)
def test_kernels_touch_what_a_step_must(
    second: Codec, first: Codec, states: float, dtype: torch.dtype, launches: tuple[Launches, list[range]]
) -> None:
    found, gradient = launches
    _step(second, first, dtype, gradient)
    numel = ROWS * COLUMNS
    each = {name: touched.bytes() / numel for name, touched in found.items()}
    print(each)
    assert each.pop("apply") == pytest.approx(3 * dtype.itemsize + states, rel=0.05)
    assert found["apply"].gradient == numel
    if "observe" in each:
        partial = 4 / FEWER_OBSERVED_ROWS if second == Factored() else 0.0  # of the columns, float32
        observed = each.pop("observe") - partial
        assert observed == pytest.approx(dtype.itemsize, rel=0.05)
        assert found["observe"].gradient == numel
    assert sum(each.values()) < SMALL


def test_a_sketch_is_filled_from_one_look_at_the_gradient(launches: tuple[Launches, list[range]]) -> None:
    found, gradient = launches
    _step(CountSketch(compression=4), CountSketch(compression=4), torch.float32, gradient)
    assert found["insert"].gradient == 3 * ROWS * COLUMNS  # each row goes into a bucket of each of three levels
    assert found["apply"].gradient == ROWS * COLUMNS
    tables = 2 * 4 * 3 * math.ceil(ROWS / (4 * 3)) / ROWS  # of both moments, float32
    assert found["insert"].bytes() / (ROWS * COLUMNS) == pytest.approx(4 + 2 * tables, rel=0.05)
