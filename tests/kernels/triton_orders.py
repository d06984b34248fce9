"""Rows by bucket of sketches, for the Triton kernels: sorted once, for all layers, and kept; and wide rows observed.

Run by test_triton.py in a process of its own, in Triton's interpreter, which is asked for when Triton is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch import Codec, CountSketch, Drop, Factored, Policy, RowWise, Rule, compress, kernels
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import FusedStep, KernelState, StepCache
from lightning_sketch.kernels.triton import device_numbers, launch, launches, layout, orders
from lightning_sketch.optimizer import on_device
from tests.kernels.fused_cases import Case, by_reference, start, train

BOTH = CountSketch(compression=4)
SHAPES = ((30, 7), (24, 17), (40, 7))


class Spy:
    """Names of what is launched, and how often something is sorted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[str] = []
        self.sorts = 0
        for name in ("observe", "settle", "hash_rows", "insert", "apply", "add_rows", "fold_rows"):
            monkeypatch.setattr(launches, name, self._spied(name, getattr(launches, name)))
        sort = orders.Batch.sort

        def counted(batch: orders.Batch) -> None:
            self.sorts += 1
            sort(batch)

        monkeypatch.setattr(orders.Batch, "sort", counted)

    def _spied(self, name: str, kernel: Any) -> Any:
        spy = self

        class Spied:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                spy.launched.append(name)
                return kernel[grid]

        return Spied()

    def step(self, optimizer: torch.optim.Optimizer) -> list[str]:
        self.launched.clear()
        optimizer.step()
        return list(self.launched)


@pytest.fixture(autouse=True)
def left_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Have every step done by the Triton kernels, and see how much they leave out."""
    seen: list[Tensor] = []

    def step(steps: list[FusedStep]) -> Tensor:
        seen.append(launch.step(steps).clone())
        return seen[-1]

    monkeypatch.setattr(kernels, "fused_kernel", lambda device: step)
    return seen


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def _layers(second: Codec, first: Codec, sparse: bool = False) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Embedding(rows, columns, sparse=sparse) for rows, columns in SHAPES)
    policy = Policy([Rule(name="*", first_moment=first, second_moment=second)])
    cls = torch.optim.SparseAdam if sparse else torch.optim.AdamW
    return model, compress(cls(list(model.parameters()), lr=0.01), model, policy, nonfinite="skip")


def _set_gradients(model: nn.ModuleList, sparse: bool = False, but: int = -1) -> None:
    for number, layer in enumerate(model):
        assert isinstance(layer, nn.Embedding)
        rows, columns = layer.weight.shape
        grad = torch.randn(rows, columns)
        if sparse:
            ids = torch.arange(number % 2, 20, 3)
            grad = torch.sparse_coo_tensor(ids[None], grad[ids], (rows, columns), check_invariants=True)
        layer.weight.grad = None if number == but else grad


def test_dense_layers_are_sorted_at_their_first_step_alone(spy: Spy) -> None:
    model, optimizer = _layers(BOTH, BOTH)
    _set_gradients(model)
    first = spy.step(optimizer)
    assert first.count("insert") == first.count("hash_rows") == spy.sorts == 2  # widths of rows
    _set_gradients(model)
    again = spy.step(optimizer)
    assert "hash_rows" not in again
    assert again.count("insert") == first.count("insert") == again.count("apply")
    assert spy.sorts == first.count("hash_rows")


def test_sketches_that_hash_otherwise_are_inserted_in_a_second_launch(spy: Spy) -> None:
    model, optimizer = _layers(BOTH, CountSketch(compression=4, depth=5))
    _set_gradients(model)
    found = spy.step(optimizer)
    assert found.count("insert") == 2 * found.count("apply")


def test_sparse_layers_are_sorted_together_at_every_step(spy: Spy) -> None:
    model, optimizer = _layers(CountSketch(width=20, depth=1), Drop(), sparse=True)
    for step in range(1, 3):
        _set_gradients(model, sparse=True)
        found = spy.step(optimizer)
        assert found.count("hash_rows") == found.count("apply")
        assert spy.sorts == step * found.count("apply")


@pytest.mark.parametrize("wave", [layout.WAVE, 16])
def test_layers_join_whose_rows_are_sorted_already(wave: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "WAVE", wave)

    def run() -> list[Tensor]:
        model, optimizer = _layers(BOTH, BOTH)
        for but in (0, 2, -1):
            _set_gradients(model, but=but)
            optimizer.step()
        tables = [optimizer.state[param]["exp_avg_table"] for param in model.parameters()]
        return [param.detach() for param in model.parameters()] + tables

    found = run()
    with by_reference():
        for one, other in zip(found, run(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [7, 100])
@pytest.mark.parametrize("width", [3, 20, 200])
def test_waves_give_the_order_of_one_sort(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 3
    buckets = torch.randint(0, width, (depth, rows), generator=torch.Generator().manual_seed(rows))
    keys = (buckets + torch.arange(depth)[:, None] * width).flatten().to(torch.int32)
    found = []
    for wave in (layout.WAVE, 16):
        monkeypatch.setattr(layout, "WAVE", wave)
        batch = orders.Batch(by_bucket=True)
        assert batch.add(rows, KernelState(Kind.SKETCH, torch.empty(0), depth=depth, width=width))
        batch.allocate(torch.device("cpu"))
        batch.order.copy_(keys)
        batch.sort()
        found.append((batch.order, batch.edges))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0].long(), keys.sort(stable=True).indices)


def test_what_is_kept_has_the_size_that_is_reported() -> None:
    sketch = KernelState(Kind.SKETCH, torch.empty(3, 5, 4), depth=3, width=5)
    step = FusedStep(torch.empty(40, 4), torch.empty(40, 4), None, 0, 0, sketch, sketch, None, 0.1, cache=StepCache())
    (order,) = orders.find_orders([(step, sketch)], True, 0).orders
    assert order.batch.order.nbytes + order.batch.edges.nbytes == orders.kept_bytes(40, [(3, 5), (3, 5)])


def test_a_layer_that_int32_cannot_number_is_refused() -> None:
    batch = orders.Batch(by_bucket=True)
    batch.add(1 << 30, KernelState(Kind.SKETCH, torch.empty(0), depth=3, width=5))
    with pytest.raises(ValueError, match=r"3,221,225,472 rows times hash functions.*depth"):
        batch.allocate(torch.device("meta"))


def test_a_first_step_that_changes_nothing_sorts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient scaler's verdict on the device leaves such a step no rows; the order is kept."""
    monkeypatch.setattr(on_device, "DEVICES", ("cpu",))
    monkeypatch.setattr(device_numbers, "_SHARES", 1)
    (layer, optimizer, generator), (other, plain, _) = (start(Case("adamw", BOTH, BOTH, 30, 5)) for _ in range(2))
    optimizer.param_groups[0]["fused"] = True
    optimizer.grad_scale = torch.tensor(1.0)
    for overflows in (True, False):
        grad = torch.randn(30, 5, generator=generator)
        layer.weight.grad = grad * (torch.inf if overflows else 1.0)
        optimizer.found_inf = torch.tensor(float(overflows))
        optimizer.step()
    other.weight.grad = grad
    plain.step()
    assert torch.equal(optimizer.state[layer.weight]["exp_avg_table"], plain.state[other.weight]["exp_avg_table"])


def _spoiled(second: Codec, dtype: torch.dtype, spoil: float) -> dict[str, Tensor]:
    """A table of rows with several chunks and its states, after steps whose gradients have bad rows, or lack them."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Embedding(40, 70, _weight=torch.randn(40, 70, generator=generator).to(dtype))
    policy = Policy([Rule(name="*", first_moment=Drop(), second_moment=second)])
    optimizer = compress(torch.optim.AdamW(layer.parameters(), lr=0.01), layer, policy, nonfinite="skip")
    for bad in ([3, 10, 11, 39], [], [0, 20]):
        grad = torch.randn(40, 70, generator=generator).to(dtype)
        for number, row in enumerate(bad):
            grad[row, 69 - number * 20] = spoil
        layer.weight.grad = grad
        optimizer.step()
    return {"weight": layer.weight.detach().clone()} | dict(optimizer.state[layer.weight])


@pytest.mark.parametrize(
    ("second", "dtype"),
    [
        (Factored(), torch.float32),
        (RowWise(compression=4), torch.bfloat16),
        (CountSketch(compression=4), torch.float32),
        (CountSketch(compression=4), torch.bfloat16),
    ],
    ids=repr,
)
def test_rows_of_several_chunks_are_left_out(
    second: Codec, dtype: torch.dtype, spy: Spy, left_out: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OBSERVED_COLUMNS": 32, "FEWER_OBSERVED_ROWS": 8}.items():
        monkeypatch.setattr(layout, name, value)
    monkeypatch.setattr(layout, "SETTLED_AT_ONCE", 8)
    found = _spoiled(second, dtype, torch.nan)
    assert [int(counts.sum()) for counts in left_out] == [4, 0, 2]
    assert spy.launched.count("settle") == 3
    with by_reference():
        expected = _spoiled(second, dtype, torch.nan)
    for key, value in expected.items():
        tolerance = 2**-6 if value.dtype == torch.bfloat16 or dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance * 0.01, msg=key)
    _spoiled(second, torch.float32, 1e30)
    # Squares that overflow are left out where all rows share their sums, and nowhere else.
    assert any(counts.any() for counts in left_out[-3:]) == isinstance(second, Factored)


def test_one_step_inserts_rows_in_the_order_of_the_gradient() -> None:
    case = Case("adamw", BOTH, BOTH, rows=80, columns=3, steps=1)
    found = train(case)
    with by_reference():
        expected = train(case)
    for key in ("exp_avg_table", "exp_avg_sq_table"):
        assert torch.equal(found[key], expected[key]), key  # type: ignore[arg-type]
