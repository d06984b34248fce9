"""The compiled CPU kernels against the reference, which is their specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

from lightning_sketch import SM3, BFloat16, Codec, CountSketch, Drop, Keep, Policy, Quantized, RowWise, Rule, compress
from lightning_sketch.kernels import cpu, native
from lightning_sketch.kernels.schema import FusedStep
from tests.kernels import fused_cases
from tests.kernels.fused_cases import QUANTIZED, RULES, Case, by_isa, by_reference, check, pairs, threads, train
from tests.tiny import assert_same

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")


SECOND, FIRST = fused_cases.SECOND | QUANTIZED, fused_cases.FIRST | QUANTIZED


@pytest.mark.parametrize(("second", "first"), pairs(SECOND, FIRST))
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_every_pair_of_codecs_under_adam(second: Codec, first: Codec, sparse: bool, fused: list[FusedStep]) -> None:
    check(Case("adamw", second, first, rows=37, columns=19, sparse=sparse))
    assert len(fused) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("second", [RowWise(), SM3(), CountSketch(compression=3), BFloat16(), Quantized()], ids=repr)
def test_every_rule(rule: str, second: Codec, dtype: torch.dtype, fused: list[FusedStep]) -> None:
    stored = second if isinstance(second, Quantized) else BFloat16()
    first = stored if "sgd" in rule or rule == "nesterov" else Drop()
    check(Case(rule, second, first, rows=23, columns=33, sparse=rule == "sparse_adam", dtype=dtype))
    assert len(fused) == 3


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_momentum_of_sm3(momentum: float, fused: list[FusedStep]) -> None:
    check(Case("adagrad", SM3(momentum=momentum), Drop(), rows=23, columns=33))
    assert all(step.momentum is not None for step in fused)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rule=st.sampled_from(["adamw", "adam", "adagrad"]),
    second=st.sampled_from(list(SECOND.values())),
    first=st.sampled_from(list(FIRST.values())),
    rows=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([512, 513, 1040])),
    sparse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    rule: str, second: Codec, first: Codec, rows: int, columns: int, sparse: bool, dtype: torch.dtype
) -> None:
    if sparse and rule != "adamw":
        rule = "adamw"  # torch's own classes refuse the others' weight decay under sparse gradients
    if second == first == Keep() or (rule == "adagrad" and second == Keep()):
        second = RowWise()
    check(Case(rule, second, first, rows, columns, sparse, dtype, steps=2))


def test_many_rows_in_few_buckets_and_in_many() -> None:
    for compression in (2, 30):  # inserted row by row, and by bucket
        codec = CountSketch(compression=compression)
        check(Case("adamw", codec, codec, rows=400, columns=150))
        check(Case("adamw", codec, CountSketch(compression=compression, depth=5), rows=400, columns=70))


INSTRUCTION_SETS = range(native.library().lightning_sketch_isa() + 1) if native.library() else ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second", SECOND)
def test_the_same_bits_on_every_instruction_set_and_number_of_threads(second: str, dtype: torch.dtype) -> None:
    cases = [
        Case("adamw", SECOND[second], BFloat16(), rows=700, columns=205, dtype=dtype),
        Case("adamw", SECOND[second], CountSketch(compression=5), rows=700, columns=205, sparse=True, dtype=dtype),
    ]
    for case in cases:
        results = []
        for number, count in [*((number, 1) for number in INSTRUCTION_SETS), (0, 2), (0, 3)]:
            with by_isa(number), threads(count):
                results.append(train(case))
        for result in results[1:]:
            assert_same(result, results[0])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", [*QUANTIZED.values(), Quantized(block=1024), Quantized(bits=4, block=16)], ids=repr)
@pytest.mark.parametrize("columns", [1, 15, 128, 205, 1500])
def test_quantized_states_are_the_references_bit_for_bit(
    columns: int, codec: Codec, dtype: torch.dtype, sparse: bool, fused: list[FusedStep]
) -> None:
    case = Case("adamw", codec, codec, rows=20, columns=columns, sparse=sparse, dtype=dtype)
    with by_reference():
        expected = train(case)
    assert not fused
    for number in INSTRUCTION_SETS:
        with by_isa(number):
            found = train(case)
        weight, other = found.pop("weight"), expected["weight"]
        assert_same(found, {key: value for key, value in expected.items() if key != "weight"})
        torch.testing.assert_close(weight, other, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert fused


@pytest.mark.parametrize("codec", QUANTIZED.values(), ids=repr)
def test_quantized_blocks_around_the_smallest_are_the_references(codec: Codec) -> None:
    """Some are stored as zeros, some come to be, and some are left where the next step decays them."""
    scales = torch.logspace(-46, -12, 60, base=10.0)[:, None]  # of rows; those of squares and those of gradients

    def run() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        layer = nn.Embedding(60, 200)
        policy = Policy([Rule(name="*", first_moment=codec, second_moment=codec)])
        optimizer = compress(torch.optim.AdamW(layer.parameters(), betas=(0.5, 0.9)), layer, policy)
        for size in (1.0, 1e-3, 0.0, 10.0):
            layer.weight.grad = torch.randn(60, 200, generator=generator) * scales * size
            optimizer.step()
        return {key: value for key, value in optimizer.state[layer.weight].items() if isinstance(value, Tensor)}

    with by_reference():
        expected = run()
    for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        assert 10 < int((expected[name] == 0).sum()) < expected[name].numel() - 10
    for number in INSTRUCTION_SETS:
        with by_isa(number):
            assert_same(run(), expected)


def test_unaligned_parameters_and_gradients(fused: list[FusedStep]) -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(21, 13, bias=False)
        memory, gradient = torch.randn(1 + 13 * 21), torch.randn(3 + 13 * 21)
        layer.weight.data = memory[1:].view(13, 21)
        optimizer = compress(torch.optim.AdamW(layer.parameters()), layer, POLICY)
        layer.weight.grad = gradient[3:].view(13, 21)
        optimizer.step()
        return layer.weight.detach()

    found = run()
    assert len(fused) == 1
    with by_reference():
        torch.testing.assert_close(found, run(), rtol=1e-6, atol=1e-7)


POLICY = Policy([Rule(name="*", exp_avg=BFloat16(), exp_avg_sq=SM3())])


def test_what_kernels_do_not_know_is_left_to_the_reference(fused: list[FusedStep]) -> None:
    for second, dtype in ((SM3(variant="I"), torch.float32), (RowWise(), torch.float64), (RowWise(), torch.float16)):
        train(Case("adamw", second, Drop(), rows=7, columns=5, dtype=dtype))
    train(Case("adamw", CountSketch(compression=2, depth=9), Drop(), rows=70, columns=5))
    layer = nn.Conv2d(3, 4, 2, bias=False)  # SM3 over four dimensions
    optimizer = compress(torch.optim.AdamW(layer.parameters()), layer, POLICY)
    layer(torch.randn(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert not fused


@pytest.mark.parametrize("second", [RowWise(), SM3(), CountSketch(compression=2), Keep(), BFloat16()], ids=repr)
def test_states_that_are_not_contiguous(second: Codec, fused: list[FusedStep]) -> None:
    def run(strided: bool) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(6, 40, bias=False)
        optimizer = compress(
            torch.optim.AdamW(layer.parameters()),
            layer,
            Policy([Rule(name="*", second_moment=second, first_moment=Drop())]),
        )
        for _ in range(3):
            layer.weight.grad = torch.randn(40, 6)
            optimizer.step()
            state = optimizer.state[layer.weight]
            for key, value in state.items():
                if strided and isinstance(value, Tensor) and value.ndim:
                    state[key] = torch.stack([value, torch.full_like(value, 7)], dim=-1)[..., 0]
        return layer.weight.detach()

    torch.testing.assert_close(run(strided=True), run(strided=False), rtol=1e-5, atol=1e-6)
    assert len(fused) == 3 + 1  # the first step of the strided run knows nothing of it yet


def test_row_ids_that_are_not_contiguous() -> None:
    def run(strided: bool) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Embedding(10, 4, sparse=True)
        policy = Policy([Rule(name="*", exp_avg_sq=RowWise(), exp_avg=Keep())])
        optimizer = compress(torch.optim.SparseAdam(layer.parameters()), layer, policy)
        indices = torch.tensor([[1, 0, 4, 0, 9, 0]])[:, ::2] if strided else torch.tensor([[1, 4, 9]])
        layer.weight.grad = torch.sparse_coo_tensor(
            indices, torch.ones(3, 4), (10, 4), is_coalesced=True, check_invariants=True
        )
        optimizer.step()
        return layer.weight.detach()

    assert torch.equal(run(strided=True), run(strided=False))


def test_empty_layers_and_gradients() -> None:
    for rows, columns in ((0, 4), (4, 0)):
        check(Case("adamw", RowWise(), Drop(), rows, columns))
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = compress(
        torch.optim.SparseAdam(layer.parameters()), layer, Policy([Rule(name="*", exp_avg_sq=RowWise())])
    )
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3), (5, 3))
    optimizer.step()
    assert torch.equal(before, layer.weight)


def test_elementwise_steps_of_narrow_layers_are_cut_into_lines(fused: list[FusedStep]) -> None:
    check(Case("adamw", CountSketch(width=20_000), Keep(), rows=5_000, columns=1, steps=1))
    assert [tuple(step.grad.shape) for step in fused] == [(1, 4096), (1, 904)]


@pytest.mark.parametrize("sparse", [False, True])
def test_the_operator_is_what_it_says(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, ...]] = []
    implementation = cpu._launch

    def spy(*arguments: object) -> None:
        given.append(tuple(cpu_copy(argument) for argument in arguments))
        implementation(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "_launch", spy)
    train(Case("adamw", CountSketch(compression=4), BFloat16(), 20, 10, sparse=sparse, steps=1))
    opcheck(torch.ops.lightning_sketch.fused_step.default, given[0])


def cpu_copy(argument: object) -> object:
    return [t.clone() for t in argument] if isinstance(argument, list) else argument.clone()  # type: ignore[attr-defined]


def test_step_under_torch_compile_does_not_recompile() -> None:
    layer = nn.Linear(8, 6)
    optimizer = compress(
        torch.optim.AdamW(layer.parameters()), layer, Policy([Rule(module=nn.Linear, exp_avg_sq=RowWise())])
    )
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    frames = []
    for _ in range(6):
        layer(torch.ones(2, 8)).sum().backward()
        step()
        optimizer.zero_grad()
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[2] == frames[-1]
