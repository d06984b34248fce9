"""The Triton kernels on a CUDA device (`pytest -m cuda`), against the reference in float32 on the CPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch import SM3, BFloat16, Codec, CountSketch, Drop, Factored, Keep, Policy, RowWise, Rule, compress
from lightning_sketch import kernels as package_kernels
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import FusedStep
from tests.kernels import observed
from tests.kernels.fused_cases import FIRST, PAIRS, QUANTIZED, RULES, SECOND, Case, check, gradient, start, train

pytestmark = pytest.mark.cuda

SPARSE = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@pytest.fixture(autouse=True)
def stepped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FusedStep]]:
    """See what steps the Triton kernels do, and fail where one of them does not prove right."""
    seen: list[FusedStep] = []
    find = package_kernels.fused_kernel

    def spied(device: torch.device) -> object:
        kernel = find(device)
        if kernel is None or device.type != "cuda":
            return kernel

        def step(steps: Sequence[FusedStep]) -> Tensor:
            seen.extend(steps)
            return kernel(steps)

        return step

    monkeypatch.setattr(package_kernels, "fused_kernel", spied)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*kernels.*")
        yield seen
    assert not package_kernels.unproved
    assert seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leave_out", [False, True])
@SPARSE
def test_sums_that_ranks_agree_on(sparse: bool, leave_out: bool, dtype: torch.dtype, stepped: list[FusedStep]) -> None:
    observe = package_kernels.observe_kernel(torch.device("cuda"))
    assert observe is not None
    stepped += observed.steps(dtype, sparse=sparse, leave_out=leave_out, device="cuda")
    observed.check(observe, stepped)


@SPARSE
@pytest.mark.parametrize(("second", "first"), PAIRS)
def test_every_pair_of_codecs(second: Codec, first: Codec, sparse: bool) -> None:
    check(Case("adamw", second, first, rows=333, columns=50, sparse=sparse, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("second", [RowWise(), SM3(), CountSketch(compression=3), BFloat16(), Factored()], ids=repr)
def test_every_rule(rule: str, second: Codec, dtype: torch.dtype) -> None:
    first = BFloat16() if rule in ("sgd", "nesterov") else Drop()
    check(Case(rule, second, first, 70, 64, sparse=rule == "sparse_adam", dtype=dtype, device="cuda"))


@SPARSE
@pytest.mark.parametrize("columns", [1, 50, 64, 300, 1_000, 4_096])
@pytest.mark.parametrize("second", ["RowWise", "RowWise sketched", "SM3", "Factored", "CountSketch", "BFloat16"])
def test_every_shape(second: str, columns: int, sparse: bool) -> None:
    for rows in (1, 9, 1_000):
        check(Case("adamw", SECOND[second], Drop(), rows, columns, sparse, device="cuda"))


@SPARSE
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_states(name: str, sparse: bool) -> None:
    """Rounded stochastically: a code may be the neighbour, so single elements differ and their norm does not."""
    for first in (QUANTIZED[name], Drop()):
        case = Case("adamw", QUANTIZED[name], first, rows=333, columns=50, sparse=sparse, device="cuda")
        found = train(case)["weight"]
        expected = train(Case(**{**vars(case), "device": "cpu"}))["weight"]
        initial = start(case)[0].weight
        assert (found.cpu() - expected).norm() <= 0.02 * (expected - initial.cpu()).norm()


@SPARSE
@pytest.mark.parametrize("second", ["RowWise", "RowWise sketched", "SM3", "Factored", "CountSketch", "BFloat16"])
def test_twice_gives_the_same_bits(second: str, sparse: bool) -> None:
    case = Case("adamw", SECOND[second], BFloat16(), rows=20_000, columns=300, sparse=sparse, device="cuda")
    one, two = train(case), train(case)
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, Tensor) else value == two[key], key


@pytest.mark.parametrize("second", [RowWise(), RowWise(compression=4), SM3(), Factored(), CountSketch(), BFloat16()])
@pytest.mark.parametrize("first", [Drop(), BFloat16(), CountSketch(compression=4)], ids=repr)
def test_rows_that_are_not_finite_are_left_out(second: Codec, first: Codec) -> None:
    """As a sparse gradient without them; where states are element-wise only the element is left out."""
    bad = [3, 4, 17, 200]
    results = []
    for sparse in (False, True):
        table = nn.Embedding(300, 33, _weight=torch.linspace(-1, 1, 300 * 33).view(300, 33), device="cuda")
        table.cuda()
        optimizer = torch.optim.AdamW(table.parameters(), lr=0.01)
        compress(
            optimizer,
            table,
            Policy([Rule(name="*", first_moment=first, second_moment=second)]),
            nonfinite="propagate" if sparse else "skip",
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            grad = torch.randn(300, 33, generator=generator)
            for number, row in enumerate(bad):
                grad[row] = (math.nan, math.inf, -math.inf, math.nan)[number]
            keep = torch.tensor([row for row in range(300) if row not in bad])
            absent = torch.sparse_coo_tensor(keep[None], grad[keep], grad.shape, check_invariants=True).coalesce()
            table.weight.grad = absent.cuda() if sparse else grad.cuda()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="NaN or inf")
                optimizer.step()
        results.append(table.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert results[0].isfinite().all()


def test_many_layers_in_one_step(stepped: list[FusedStep]) -> None:
    """Of other widths, dtypes and codecs, a bad row in one of them: each as if it were alone."""
    shapes = [(50, 8), (70, 64), (1, 300), (33, 50), (20, 4_096), (64,)]
    codecs = list(SECOND.values())
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes * 3]
    rules = [Rule(name=str(i), first_moment=Drop(), second_moment=codecs[i % 12]) for i in range(len(weights))]
    found: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        layers = nn.ParameterDict(
            {str(i): nn.Parameter(weight.to(device, copy=True)) for i, weight in enumerate(weights)}
        )
        optimizer = compress(torch.optim.AdamW(layers.parameters(), lr=0.01), layers, Policy(rules), nonfinite="skip")
        noise = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in layers.values():
                parameter.grad = torch.randn(parameter.shape, generator=noise).to(device)
            layers["1"].grad[2, 5] = math.nan
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="NaN or inf")
                optimizer.step()
        found[device] = [parameter.detach().cpu() for parameter in layers.values()]
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("second", ["RowWise", "RowWise sketched", "SM3", "Factored", "CountSketch", "BFloat16"])
@pytest.mark.parametrize("first", [Drop(), BFloat16()], ids=repr)
def test_a_step_does_not_wait_for_the_device(second: str, first: Codec) -> None:
    case = Case("adamw", SECOND[second], first, rows=1_000, columns=64, device="cuda")
    layer, optimizer, generator = start(case)
    for step in range(4):
        layer.weight.grad = gradient(case, generator)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("first", [FIRST["BFloat16"], Keep()], ids=repr)
def test_states_saved_on_the_device_go_on_on_the_cpu(first: Codec) -> None:
    case = Case("adamw", RowWise(), first, rows=100, columns=64, device="cuda")
    layer, optimizer, generator = start(case)
    layer.weight.grad = gradient(case, generator)
    optimizer.step()
    other, resumed, _ = start(Case("adamw", RowWise(), first, rows=100, columns=64))
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    last = gradient(case, generator)
    layer.weight.grad, other.weight.grad = last, last.cpu()
    optimizer.step(), resumed.step()
    torch.testing.assert_close(layer.weight.cpu(), other.weight, rtol=1e-5, atol=1e-5)


@SPARSE
@pytest.mark.parametrize("kind", [Kind.ROW, Kind.ROW_SKETCH, Kind.FACTORED])
@pytest.mark.parametrize("first", [False, True])
def test_a_state_that_holds_the_step_already_takes_no_sums(kind: Kind, first: bool, sparse: bool) -> None:
    step = package_kernels.fused_kernel(torch.device("cuda"))
    assert step is not None
    observed.check_held(step, *observed.held_step(kind, first=first, sparse=sparse, device="cuda"))
