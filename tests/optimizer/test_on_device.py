"""Numbers that stay on the device: `capturable` and `fused` groups, and SGD. The device is the CPU."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from lightning_sketch import (
    BFloat16,
    CountSketch,
    Drop,
    Factored,
    RowWise,
    compress,
    decompress,
    kernels,
    report,
)
from lightning_sketch.optimizer import on_device
from lightning_sketch.optimizer.nonfinite import LeftOut
from tests.tiny import CASES, CODECS, FOR_SGD, Tiny, assert_same, give_gradients, on_table, snapshot, train

LOSSY = on_table(first_moment=BFloat16(), second_moment=Factored())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU be a device on which numbers stay. Its own kernels read them on the host."""
    monkeypatch.setattr(on_device, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: None)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have steps believe that they are captured."""

    def now(value: bool) -> None:
        for module in ("optimizer.step", "optimizer.nonfinite", "optimizer.stock"):
            monkeypatch.setattr(f"lightning_sketch.{module}.capturing", lambda: value)

    return now


def _table(model: Tiny, make: Any, policy: Any = LOSSY, **kwargs: Any) -> Any:
    """An optimizer of the table alone: torch's own step wants a real device for the others."""
    return compress(make(model.table.parameters(), **kwargs), model.table, policy)


def _in_group(model: Tiny, make: Any, policy: Any, **group: Any) -> Any:
    """The same, with options that only a parameter group takes."""
    return compress(make([{"params": list(model.table.parameters()), **group}]), model.table, policy)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_same_wherever_its_numbers_are(case: Any, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = FOR_SGD if case.cls is SGD else CODECS
    for name in names:
        if name == "exact":  # lazy
            continue
        found = []
        for devices in ((), ("cpu",)):
            monkeypatch.setattr(on_device, "DEVICES", devices)
            torch.manual_seed(0)
            model = Tiny()
            optimizer = _table(model, case.make, on_table(**CODECS[name]))
            optimizer.param_groups[0]["capturable"] = bool(devices)
            train(model, optimizer, range(4))
            found.append(snapshot(model.table, optimizer))
        for key, value in found[0].items():
            assert torch.allclose(found[1][key].float(), value.float(), rtol=1e-5, atol=1e-6), (name, key)


@pytest.mark.parametrize("name", [name for name in CODECS if name != "exact"])
def test_what_a_scaler_found_infinite_changes_nothing(name: str, here: None) -> None:
    model = Tiny()
    optimizer = _table(model, AdamW, on_table(**CODECS[name]), fused=True)
    for step, overflows in enumerate((False, True, False)):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(float(overflows))
        give_gradients(model, step)
        model.table.weight.grad *= 512
        if overflows:
            model.table.weight.grad[3, 1] = torch.inf
        before = snapshot(model.table, optimizer)
        optimizer.step()
        if overflows:
            assert_same(snapshot(model.table, optimizer), before)
    assert optimizer.state[model.table.weight]["step"] == 2


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_a_grad_scaler_is_read_where_its_numbers_are(nonfinite: Any, here: None) -> None:
    """Kept layers by torch's fused kernels, compressed ones by ours: the scaler leaves unscaling to both."""
    model = Tiny()
    unscaled = copy.deepcopy(model)
    optimizer = compress(AdamW(model.parameters(), lr=0.05, fused=True), model, LOSSY, nonfinite=nonfinite)
    reference = compress(AdamW(unscaled.parameters(), lr=0.05), unscaled, LOSSY)
    assert optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # creates the scale
    for step in range(6):
        give_gradients(model, step)
        for param in model.parameters():
            param.grad *= scaler.get_scale()
        if step == 2:
            model.table.weight.grad[0, 0] = torch.inf
        before = snapshot(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_same(snapshot(model, optimizer), before)
            continue
        give_gradients(unscaled, step)
        reference.step()
    assert scaler.get_scale() == 512
    assert not report(optimizer).skipped
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, unscaled.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert decompress(optimizer)._step_supports_amp_scaling


def test_a_scaler_does_both_itself_where_a_layer_is_not_on_such_a_device() -> None:
    model = Tiny()
    assert not hasattr(compress(AdamW(model.parameters(), fused=True), model, LOSSY), "_step_supports_amp_scaling")


def test_capturable_is_refused_on_the_cpu_as_under_torch() -> None:
    for make in (Adam, AdamW, RMSprop):
        said = []
        for converted in (False, True):
            model = Tiny()
            optimizer = make(model.table.parameters(), capturable=True)
            if converted:
                compress(optimizer, model.table, LOSSY)
            give_gradients(model, 0)
            before = model.table.weight.detach().clone()
            with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on") as error:
                optimizer.step()
            said.append(str(error.value))
            assert torch.equal(model.table.weight, before)
        assert "table" not in said[0]
        assert "weight is on cpu" in said[1]


def test_capturable_that_is_set_later_is_noticed(here: None) -> None:
    model = Tiny()
    optimizer = _table(model, AdamW)
    train(model, optimizer, [0])
    step = optimizer.state[model.table.weight]["step"]
    optimizer.param_groups[0]["capturable"] = True
    train(model, optimizer, [1])
    assert step == 1 or optimizer.state[model.table.weight]["step"] is step  # moved, or there already
    assert optimizer.state[model.table.weight]["step"] == 2


@pytest.mark.parametrize(
    ("codec", "why"),
    [
        (RowWise(lazy=True), r"RowWise of exp_avg_sq of weight looks for rows without a gradient \(lazy=True\)"),
        (CountSketch(2, cleaning_interval=5, cleaning_factor=0.5), r"counts steps \(cleaning_interval\)"),
    ],
    ids=["lazy", "cleaning"],
)
def test_codecs_that_need_the_host_are_refused_by_name(codec: Any, why: str, here: None) -> None:
    model = Tiny()
    optimizer = _table(model, AdamW, on_table(first_moment=Drop(), second_moment=codec), capturable=True)
    with pytest.raises(ValueError, match=why):
        train(model, optimizer, [0])
    optimizer.param_groups[0].update(capturable=False, fused=True)
    train(model, optimizer, [0])  # on the host, as before


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("make", [Adam, AdamW, RMSprop, Adagrad, SparseAdam, partial(SGD, lr=0.1, momentum=0.9)])
def test_a_sparse_gradient_is_not_captured(make: Any, capturable: bool, here: None, captured: Any) -> None:
    model = Tiny()
    optimizer = _in_group(model, make, LOSSY, capturable=capturable)
    give_gradients(model, 0, sparse=True)
    optimizer.step()
    captured(True)
    before = snapshot(model.table, optimizer)
    with pytest.raises(RuntimeError, match="the gradient of weight is sparse, and a step with it cannot be captured"):
        optimizer.step()
    assert_same(snapshot(model.table, optimizer), before)


@pytest.mark.parametrize("make", [partial(Adagrad, lr_decay=0.1), SparseAdam])
def test_groups_of_optimizers_without_the_option_may_say_capturable(make: Any, here: None, captured: Any) -> None:
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, expected = _in_group(model, make, LOSSY, capturable=True), _table(plain, make)
    for step in range(3):
        captured(step > 0)  # as if a graph was replayed
        train(model, optimizer, [step])
        captured(False)
        train(plain, expected, [step])
    torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-5, atol=1e-6)
    assert optimizer.state[model.table.weight]["step"] == 3


def test_kept_layers_whose_count_a_graph_would_repeat_are_refused(here: None, captured: Any) -> None:
    for lr_decay in (0.0, 0.1):
        model = Tiny()
        groups = [{"params": model.parameters(), "capturable": True}]
        optimizer = compress(Adagrad(groups, lr_decay=lr_decay), model, on_table(second_moment=Factored()))
        train(model, optimizer, [0])
        captured(True)
        if lr_decay:
            with pytest.raises(RuntimeError, match="torch's Adagrad with lr_decay"):
                optimizer.step()
        else:
            optimizer.step()
        captured(False)


@pytest.mark.parametrize("make", [Adam, AdamW, RMSprop, Adagrad, SparseAdam])
def test_steps_that_the_host_counts_are_not_captured(make: Any, here: None, captured: Any) -> None:
    model = Tiny()
    optimizer = _table(model, make)
    train(model, optimizer, [0])
    captured(True)
    with pytest.raises(RuntimeError, match="a step of weight cannot be captured into a graph: its step count is kept"):
        optimizer.step()


def test_optimizers_without_a_rule_are_not_captured(captured: Any) -> None:
    model = Tiny()
    optimizer = compress(NAdam(model.parameters()), model, on_table(first_moment=BFloat16()))
    train(model, optimizer, [0])
    captured(True)
    with pytest.raises(RuntimeError, match="a step of NAdam with compressed layers cannot be captured"):
        optimizer.step()


def test_a_first_step_is_not_captured(here: None, captured: Any) -> None:
    model = Tiny()
    optimizer = _table(model, AdamW, capturable=True)
    give_gradients(model, 0)
    captured(True)
    with pytest.raises(RuntimeError, match="make a few steps on a side stream first"):
        optimizer.step()


def test_what_replays_left_out_is_said_by_the_next_step_or_report(
    here: None, captured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeftOut, "is_late", staticmethod(lambda counts: True))
    monkeypatch.setattr(LeftOut, "_copy", lambda self, counts, units: self._late.append((counts.clone(), None, units)))
    for ask in (report, lambda optimizer: optimizer.step()):
        model = Tiny()
        optimizer = _table(model, AdamW, capturable=True)
        give_gradients(model, 0)
        model.table.weight.grad[4, 1] = torch.nan
        model.table.weight.grad[5] = torch.inf
        optimizer.step()
        with pytest.raises(FloatingPointError, match=r"gradient of weight \(2 rows\) in an earlier step"):
            report(optimizer)
        captured(True)
        for _ in range(3):  # as if a graph was replayed
            optimizer.step()
        captured(False)
        with pytest.raises(FloatingPointError, match=r"gradient of weight \(6 rows\) in an earlier step"):
            ask(optimizer)
        report(optimizer)  # said once


def test_a_scheduler_changes_a_learning_rate_that_stays(here: None) -> None:
    model = Tiny()
    plain = copy.deepcopy(model)
    runs = []
    for one, lr in ((model, torch.tensor(0.1)), (plain, 0.1)):
        optimizer = _table(one, AdamW, lr=lr, capturable=isinstance(lr, Tensor))
        scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(3):
            train(one, optimizer, [step])
            scheduler.step()
        runs.append(optimizer)
    assert isinstance(runs[0].param_groups[0]["lr"], Tensor)
    torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-5, atol=1e-6)


def test_a_compiled_step_is_compiled_once(here: None) -> None:
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, other = _table(model, AdamW, lr=torch.tensor(0.1), capturable=True), _table(plain, AdamW, lr=0.1)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    graphs: list[int] = []
    for number in range(5):
        give_gradients(model, number)
        step()
        train(plain, other, [number])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2]
    torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codecs", ["sketch", "factored", "SM3", "bfloat16"])
def test_training_goes_on_from_a_checkpoint(codecs: str, here: None) -> None:
    def made(model: Tiny) -> Any:
        return _table(model, AdamW, on_table(**CODECS[codecs]), lr=torch.tensor(0.1), capturable=True)

    torch.manual_seed(0)
    model = Tiny()
    optimizer = made(model)
    train(model, optimizer, range(2))
    resumed = copy.deepcopy(model)
    other = made(resumed)
    saved = copy.deepcopy(optimizer.state_dict())
    assert isinstance(saved["state"][0]["step"], Tensor)
    other.load_state_dict(saved)
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, [2, 3])
    assert_same(snapshot(resumed.table, other), snapshot(model.table, optimizer))
    assert decompress(other).state[resumed.table.weight]["step"] == 4
