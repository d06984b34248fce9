"""Triton kernels in the interpreter, where the numbers of steps stay on the device. The device here is the CPU.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sketch import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Policy,
    RowWise,
    Rule,
    compress,
)
from lightning_sketch import kernels as package_kernels
from lightning_sketch.codecs import decay
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.kernels.triton import device_numbers, launch
from lightning_sketch.optimizer import on_device
from tests.kernels.fused_cases import RULES, Case, start

PAIRS: list[tuple[Codec, Codec]] = [
    (RowWise(), Drop()),
    (RowWise(compression=4), BFloat16()),
    (SM3(), Drop()),
    (Factored(floor=2.0), BFloat16()),
    (CountSketch(compression=4), CountSketch(compression=4)),
    (CountSketch(width=10_000), Keep()),
    (BFloat16(), BFloat16(stochastic=False)),
]
HERE, NOWHERE = ("cpu",), ()


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FusedStep]]:
    """Have every step done by the Triton kernels, and see which."""
    seen: list[FusedStep] = []

    def step(steps: list[FusedStep]) -> Tensor:
        seen.extend(steps)
        return launch.step(steps)

    monkeypatch.setattr(package_kernels, "fused_kernel", lambda device: step)
    # Few programs, which the interpreter runs one after the other; each multiplies several pieces of a state.
    monkeypatch.setattr(device_numbers, "_SHARES", 2)
    monkeypatch.setattr(device_numbers, "_TILE", 4)
    return seen


class NothingIsRead(TorchDispatchMode):
    """Raises where the host asks for a number of a tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host waited for a number")
        return func(*args, **(kwargs or {}))


def _found(layer: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    return {"weight": layer.weight.detach().clone()} | {k: v.clone() for k, v in optimizer.state[layer.weight].items()}


def _train(case: Case, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...], **group: Any) -> dict[str, Tensor]:
    """A table and its states after steps, the last ones at another learning rate."""
    monkeypatch.setattr(on_device, "DEVICES", where)
    layer, optimizer, generator = start(case)
    optimizer.param_groups[0].update(group)
    for step in range(case.steps):
        if step == case.steps - 1:
            lr = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = lr.mul_(0.5) if isinstance(lr, Tensor) else lr * 0.5
        layer.weight.grad = torch.randn(case.rows, case.columns, generator=generator)
        optimizer.step()
    return _found(layer, optimizer)


def _check(case: Case, monkeypatch: pytest.MonkeyPatch, fused: list[FusedStep]) -> None:
    expected = _train(case, monkeypatch, NOWHERE)
    assert {step.on_device for step in fused} == {None}
    fused.clear()
    lr = torch.tensor(RULES[case.rule][1]["lr"], dtype=torch.float64)
    found = _train(case, monkeypatch, HERE, capturable=True, lr=lr)
    assert len(fused) == case.steps
    assert all(step.on_device is not None for step in fused)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("second", "first"), PAIRS, ids=repr)
def test_every_codec_makes_the_same_bits(
    second: Codec, first: Codec, monkeypatch: pytest.MonkeyPatch, fused: list[FusedStep]
) -> None:
    _check(Case("adamw", second, first, rows=11, columns=5), monkeypatch, fused)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("adamw", "sparse_adam")])
def test_every_rule_makes_the_same_bits(rule: str, monkeypatch: pytest.MonkeyPatch, fused: list[FusedStep]) -> None:
    first = BFloat16() if rule in ("sgd", "nesterov") else Drop()
    _check(Case(rule, RowWise(), first, rows=11, columns=5), monkeypatch, fused)


def test_the_momentum_of_sm3(monkeypatch: pytest.MonkeyPatch, fused: list[FusedStep]) -> None:
    _check(Case("adagrad", SM3(momentum=0.9), Drop(), rows=11, columns=5), monkeypatch, fused)


def test_the_first_gradient_is_not_dampened(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("sgd", RowWise(), BFloat16(), rows=11, columns=5)
    expected = _train(case, monkeypatch, NOWHERE, dampening=0.5)
    found = _train(case, monkeypatch, HERE, dampening=0.5)
    assert torch.equal(found["weight"], expected["weight"])


@pytest.mark.parametrize("second", [RowWise(), RowWise(compression=4), SM3(), Factored(), CountSketch(4)], ids=repr)
def test_scales_that_get_small_are_renormalized(second: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("adamw", second, Drop(), rows=11, columns=5, steps=4)
    betas = (0.9, 1e-6)  # far below the smallest scale after two steps
    assert betas[1] ** 2 < decay.MIN_SCALE
    expected = _train(case, monkeypatch, NOWHERE, betas=betas)
    found = _train(case, monkeypatch, HERE, capturable=True, betas=betas)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)
    (scale,) = (value for name, value in found.items() if name.endswith("scale"))
    assert scale >= decay.MIN_SCALE


@pytest.mark.parametrize(("second", "first"), [*PAIRS, (SM3(momentum=0.9), Drop())], ids=repr)
def test_what_a_scaler_found_infinite_changes_nothing(
    second: Codec, first: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "DEVICES", HERE)
    layer, optimizer, generator = start(Case("adamw", second, first, rows=11, columns=5))
    other, plain, _ = start(Case("adamw", second, first, rows=11, columns=5))
    optimizer.param_groups[0]["fused"] = True
    optimizer.grad_scale = torch.tensor(512.0)
    for overflows in (False, True, False):
        optimizer.found_inf = torch.tensor(float(overflows))
        grad = torch.randn(11, 5, generator=generator)
        layer.weight.grad = grad * 512
        if overflows:
            layer.weight.grad[3, 2] = torch.inf
        before = _found(layer, optimizer)
        optimizer.step()  # nor does nonfinite="raise" raise
        if overflows:
            for name, value in _found(layer, optimizer).items():
                assert torch.equal(value, before[name]), name
        else:
            other.weight.grad = grad
            plain.step()
    for name, value in _found(other, plain).items():
        assert torch.equal(_found(layer, optimizer)[name], value), name


def _model() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 7), nn.Linear(7, 3))
    rules = [
        Rule(name="0.weight", exp_avg=CountSketch(width=2), exp_avg_sq=Factored()),
        Rule(name="1.weight", exp_avg=BFloat16(), exp_avg_sq=SM3()),
        Rule(name="*", exp_avg=Drop(), exp_avg_sq=RowWise()),
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), capturable=True)
    return model, compress(optimizer, model, Policy(rules), nonfinite="propagate")


def _give(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def test_the_host_reads_nothing_and_the_table_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "DEVICES", HERE)
    model, optimizer = _model()
    for step in range(2):
        _give(model, step)
        optimizer.step()
    copied: list[int] = []
    there = device_numbers._there
    monkeypatch.setattr(device_numbers, "_there", lambda host, device: copied.append(len(host)) or there(host, device))
    with NothingIsRead():
        for _ in range(3):
            for param in model.parameters():
                param.grad.normal_()
            optimizer.step()
        assert not copied
        held = [param.grad for param in model.parameters()]
        _give(model, 0)
        optimizer.step()
    assert copied == [8 * len(held)]  # addresses of the gradients, and nothing else


def _as_captured(monkeypatch: pytest.MonkeyPatch, now: bool) -> None:
    for module in ("optimizer.step", "optimizer.nonfinite", "kernels.triton.device_numbers"):
        monkeypatch.setattr(f"lightning_sketch.{module}.capturing", lambda: now)


def test_a_captured_step_copies_nothing_and_forgets_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that lie elsewhere, as those of a backward pass that is captured, too."""
    monkeypatch.setattr(on_device, "DEVICES", HERE)
    (model, optimizer), (other, plain) = _model(), _model()
    other.load_state_dict(model.state_dict())
    before = [torch.zeros_like(param) for param in model.parameters()]
    for step in range(4):
        captured = step == 2
        for each, its in ((model, optimizer), (other, plain)):
            _give(each, step)
            if each is model and not captured:
                for param, held in zip(each.parameters(), before, strict=True):
                    param.grad = held.copy_(param.grad)
            with monkeypatch.context() as patch:
                if captured and each is model:
                    _as_captured(patch, True)
                    patch.setattr(device_numbers, "_there", None)  # would copy
                its.step()
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, expected)


def test_a_capture_needs_a_step_of_the_same_layers_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "DEVICES", HERE)
    model, optimizer = _model()
    _give(model, 0)
    optimizer.step()
    model[1].weight.grad = None
    weights = [param.detach().clone() for param in model.parameters()]
    _as_captured(monkeypatch, True)
    with pytest.raises(RuntimeError, match="make a few steps with the same gradients on a side stream first"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), weights, strict=True))
