"""Kernels that do not prove right on a device step nothing there. The device here is the CPU, the kernels its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

import lightning_sketch as ls
from lightning_sketch import kernels
from lightning_sketch.kernels import cpu
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.optimizer import bindings, proof
from lightning_sketch.rules.adam import AdamWRule
from tests.kernels.fused_cases import by_reference

CODECS = {
    "row-wise": {"exp_avg": ls.Drop(), "exp_avg_sq": ls.RowWise()},
    "row-wise, sketched": {"exp_avg": ls.Drop(), "exp_avg_sq": ls.RowWise(compression=4)},
    "factored": {"exp_avg": ls.BFloat16(), "exp_avg_sq": ls.Factored()},
    "sm3": {"exp_avg": ls.Drop(), "exp_avg_sq": ls.SM3()},
    "sketches": {"exp_avg": ls.CountSketch(), "exp_avg_sq": ls.CountSketch()},
    "lazy": {"exp_avg": ls.Drop(), "exp_avg_sq": ls.RowWise(lazy=True)},
    "quantized": {"exp_avg": ls.Quantized(), "exp_avg_sq": ls.Quantized(bits=4)},
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing was proved before."""
    proof._proved.clear()
    kernels.unproved.clear()
    yield
    proof._proved.clear()
    kernels.unproved.clear()


def wrong(steps: Sequence[FusedStep]) -> Tensor:
    """As the compiled kernels, but a thousandth off."""
    counts = cpu.step(steps)
    for step in steps:
        step.param.mul_(1.001)
    return counts


def broken(steps: Sequence[FusedStep]) -> Tensor:
    """What a compiler may do."""
    raise RuntimeError("PTX was compiled with an unsupported toolchain")


def is_proved(
    kernel: kernels.FusedKernel, name: str = "row-wise", shape: tuple[int, ...] = (50, 24), sparse: bool = False
):
    param = torch.empty(shape)
    optimizer = ls.compress(
        torch.optim.AdamW([weight := nn.Parameter(param)]),
        _model(weight),
        ls.Policy([ls.Rule(name="*", **CODECS[name])]),
    )
    layer = LayerRecord.from_record(optimizer.param_groups[0]["compression"][0])
    return proof.proved(optimizer.rule, layer, param, optimizer.param_groups[0], sparse=sparse, kernel=kernel)


def _model(weight: nn.Parameter) -> nn.Module:
    model = nn.Module()
    model.weight = weight
    return model


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_right_kernels_are_proved(name: str, sparse: bool) -> None:
    assert is_proved(cpu.step, name, sparse=sparse)
    assert not kernels.unproved


@pytest.mark.parametrize("shape", [(9,), (7, 1), (16_384, 3), (5, 5_001)])
def test_for_any_shape(shape: tuple[int, ...]) -> None:
    assert is_proved(cpu.step, shape=shape)
    assert not is_proved(wrong, shape=shape)


@pytest.mark.parametrize(("rows", "right"), [(1, True), (40, False)])
def test_a_code_may_round_otherwise_but_no_whole_column(rows: int, right: bool) -> None:
    def other_codes(steps: Sequence[FusedStep]) -> Tensor:
        counts = cpu.step(steps)
        for step in steps:
            assert step.first is not None
            step.first.data[:rows, -1] ^= 1
        return counts

    assert is_proved(other_codes, "quantized", shape=(50, 4104)) == right


@pytest.mark.parametrize("kernel", [wrong, broken])
@pytest.mark.parametrize("name", CODECS)
def test_others_are_not_and_a_warning_says_why(
    name: str, kernel: kernels.FusedKernel, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_proved(kernel, name)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "lightning_sketch.optimizer.proof"]
    assert "weight" in said
    assert ("unsupported toolchain" if kernel is broken else "is not the reference's") in said
    assert not is_proved(kernel, name)  # said once
    assert len([record for record in caplog.records if record.name == "lightning_sketch.optimizer.proof"]) == 1


def test_layers_whose_kernels_are_not_proved_are_stepped_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(24, 50, bias=False)
        optimizer = torch.optim.AdamW(model.parameters())
        ls.compress(optimizer, model, ls.Policy([ls.Rule(name="*", **CODECS["factored"])]))
        model.weight.grad = torch.randn(50, 24)
        for _ in range(2):
            optimizer.step()
        return model.weight.detach()

    bind = bindings.Bindings.bind

    def bind_as_on_an_accelerator(self, param, parts, needed, group, tensors):
        found = bind(self, param, parts, needed, group, tensors)
        for part, each in zip(parts, found, strict=True):
            right = proof.proved(AdamWRule(), part.layer, each.param, group, sparse=False, kernel=broken)
            each.cache.fusable = each.cache.fusable if right else False
        return found

    with by_reference():
        expected = trained()
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: broken)
    monkeypatch.setattr(bindings.Bindings, "bind", bind_as_on_an_accelerator)
    assert torch.equal(trained(), expected)


def test_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: broken)
    kernels.unproved["cuda"] = "table.weight: it failed"
    words = kernels.describe(torch.device("cuda"))
    assert words == "Triton on cuda; plain PyTorch where it proved wrong (table.weight: it failed)"
