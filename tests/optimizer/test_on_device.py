"""Numbers that stay on the device: `capturable` and `fused` groups, and SGD. The device is the CPU, or a fake one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.launches import CountLaunches, counting
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
from lightning_sketch.codecs import scale_tensor
from lightning_sketch.layers.step_count import step_tensor
from lightning_sketch.optimizer import on_device
from lightning_sketch.optimizer.bindings import Bindings
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


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountLaunches]:
    """A fake device; tensors stay bound, as real ones do."""
    bound: dict[int, Any] = {}
    bind = Bindings.bind

    def remembered(self: Bindings, param: Tensor, *args: Any, **kwargs: Any) -> Any:
        bound[id(param)] = bind(self, param, *args, **kwargs)
        return bound[id(param)]

    monkeypatch.setattr(Bindings, "bind", remembered)
    monkeypatch.setattr(Bindings, "find", lambda self, param, *args: bound.get(id(param)))
    with counting() as mode:
        yield mode


def _on(mode: CountLaunches, make: Any, **codecs: Any) -> tuple[nn.Module, Any]:
    model = nn.Embedding(1, 1)
    model.weight = nn.Parameter(mode.tensor(300, 16))
    optimizer = compress(make(model.parameters()), model, on_table(**codecs))
    model.weight.grad = mode.tensor(300, 16)
    return model, optimizer


CUDA = {
    "AdamW, capturable": lambda params: AdamW(params, lr=torch.full((), 0.1, device="cuda"), capturable=True),
    "AdamW, fused": partial(AdamW, fused=True),
    "RMSprop": partial(RMSprop, capturable=True),
    "SGD": partial(SGD, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: Adagrad([{"params": list(params), "capturable": True}], lr_decay=0.1),
    "SparseAdam": lambda params: SparseAdam([{"params": list(params), "capturable": True}]),
}


@pytest.mark.parametrize("make", CUDA)
@pytest.mark.parametrize("name", [name for name in FOR_SGD if name not in ("exact", "rows")])
def test_a_step_in_plain_pytorch_waits_for_nothing(name: str, make: str, cuda: CountLaunches) -> None:
    codecs = {
        key: value
        for key, value in CODECS[name].items()
        if make not in ("RMSprop", "Adagrad") or key == "second_moment"
    }
    _, optimizer = _on(cuda, CUDA[make], **codecs)
    optimizer.step()
    cuda.reset()
    for _ in range(2):
        if make == "AdamW, fused":
            optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
        optimizer.step()
    assert cuda.waits == 0
    assert cuda.launches > 0


@pytest.mark.parametrize("make", CUDA)
def test_step_and_scale_are_on_the_device_and_stay_when_states_are_saved(make: str, cuda: CountLaunches) -> None:
    codecs = {"first_moment": CountSketch(2)} if make == "SGD" else {"second_moment": Factored()}
    model, optimizer = _on(cuda, CUDA[make], **codecs)
    optimizer.step()
    state = optimizer.state[model.weight]
    (scale,) = (key for key in state if key.endswith("_scale"))
    for key in ("step", scale):
        assert state[key].device.type == "cuda"
    before = dict(state)
    optimizer.state_dict()
    assert all(state[key] is value for key, value in before.items())


def test_numbers_of_other_groups_are_on_the_host(cuda: CountLaunches) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = _on(cuda, AdamW, second_moment=Factored())
        optimizer.step()
    state = optimizer.state[model.weight]
    assert {state[key].device.type for key in ("step", "exp_avg_sq_scale")} == {"cpu"}


def test_numbers_that_were_loaded_or_moved_to_the_host_go_back() -> None:
    with counting() as mode:
        model, optimizer = _on(mode, CUDA["AdamW, capturable"], second_moment=Factored())
        optimizer.step()
        state = optimizer.state[model.weight]
        state["step"], state["exp_avg_sq_scale"] = step_tensor(3.0), scale_tensor(0.5)
        assert {state[key].device.type for key in ("step", "exp_avg_sq_scale")} == {"cpu"}
        optimizer.step()
        assert {state[key].device.type for key in ("step", "exp_avg_sq_scale")} == {"cuda"}


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


def test_of_hyperparameters_only_the_learning_rate_may_be_on_the_device(cuda: CountLaunches) -> None:
    _, optimizer = _on(cuda, CUDA["AdamW, capturable"], second_moment=Factored())
    optimizer.param_groups[0]["betas"] = (0.9, torch.full((), 0.99, device="cuda"))
    with pytest.raises(ValueError, match="betas is a tensor on a device, and weight is compressed"):
        optimizer.step()
    assert not optimizer.state
