"""The sampled rows' exact states are those that torch's optimizer would keep."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, RMSprop

from lightning_sketch import (
    BFloat16,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Monitor,
    Policy,
    Rule,
    compress,
    decompress_state_dict,
    report,
    reset_states,
)
from tests.tiny import ADAM, ADAMW, CASES, CODECS, EXACT, FOR_SGD, Case, Tiny, give_gradients, on_table, train

#: As exact, but rows without a gradient decay, as under dense gradients.
DECAYS = CountSketch(width=1 << 20)


def watched(case, codecs, *, rows=64, every=1, nonfinite="raise", dtype=torch.float32, **options):
    """`Tiny`, its table compressed, and the monitor of it."""
    model, monitor = Tiny(dtype=dtype), Monitor(rows=rows, every=every)
    optimizer = case.make(model.parameters(), **options)
    compress(optimizer, model, on_table(**codecs), nonfinite=nonfinite, monitor=monitor)
    return model, optimizer, monitor


def step_table(model, optimizer, step, *, sparse=False):
    """A step of the table alone: torch's Adam steps no kept layer that has a sparse gradient."""
    give_gradients(model, step, sparse=sparse)
    model.kept.zero_grad()
    optimizer.step()


def assert_exact(monitor, tolerance=1e-6):
    (figures,) = monitor.by_layer().values()
    assert figures.errors
    assert all(error < tolerance for error in figures.errors.values()), str(figures)
    if figures.cosine is not None:
        assert figures.cosine == pytest.approx(1, abs=tolerance)
        assert figures.norm_ratio == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("codec", [EXACT, DECAYS], ids=["lazy", "decays"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_that_are_stored_exactly_have_no_error(case, codec, sparse):
    sparse = sparse or case.sparse
    model, optimizer, monitor = watched(case, {"first_moment": codec, "second_moment": codec})
    for step in range(6):
        step_table(model, optimizer, step, sparse=sparse)
        assert_exact(monitor)


@pytest.mark.parametrize("cls", [AdamW, Adagrad, RMSprop, SGD])
def test_maximize_a_new_learning_rate_and_float64_are_followed(cls):
    case = Case(cls, {"lr": 0.1, "maximize": True, "weight_decay": 0.1} | ({"momentum": 0.9} if cls is SGD else {}))
    model, optimizer, monitor = watched(case, CODECS["exact"], dtype=torch.float64)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        train(model, optimizer, [step])
        assert_exact(monitor, 1e-12)


def test_parameters_of_any_dtype_and_number_of_dimensions_are_watched():
    shapes = ((), (7,), (5, 3, 2), (100, 2, 2))
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)
        policy = Policy([Rule(first_moment=DECAYS, second_moment=DECAYS)])
        monitor = Monitor(rows=8, every=1)
        optimizer = compress(ADAM.make(model.parameters()), model, policy, monitor=monitor)
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
        assert len(monitor.by_layer()) == len(shapes)
        for figures in monitor.by_layer().values():
            assert max(figures.errors.values()) < 1e-5
            assert figures.cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_errors_are_against_the_states_of_torch(name):
    """Under coupled weight decay, too: both step the same parameters."""
    model, optimizer, monitor = watched(ADAM, CODECS[name])
    plain = Tiny()
    reference = ADAM.make(plain.parameters())
    for step in range(5):
        plain.load_state_dict(model.state_dict())
        train(plain, reference, [step])
        train(model, optimizer, [step])
    dense = copy.deepcopy((model, optimizer))[1].state_dict()
    stored, exact = decompress_state_dict(dense)["state"][0], reference.state[plain.table.weight]
    (figures,) = monitor.by_layer().values()
    for state, error in figures.errors.items():
        expected = (stored[state] - exact[state]).norm() / exact[state].norm()
        assert error == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert ("exp_avg" in figures.errors) is not isinstance(CODECS[name]["first_moment"], Drop)


def train_beside(model, optimizer, plain, reference) -> torch.Tensor:
    """Five steps of both, each from where `model` is; the table before the last."""
    for step in range(5):
        before = model.table.weight.detach().clone()
        plain.load_state_dict(model.state_dict())
        train(plain, reference, [step])
        train(model, optimizer, [step])
    return before


@pytest.mark.parametrize("name", ["sketch", "sketched rows", "factored"])
def test_updates_are_compared_as_the_parameter_moves(name):
    case = Case(AdamW, {"lr": 0.05, "weight_decay": 0.0})
    model, optimizer, monitor = watched(case, CODECS[name])
    plain = Tiny()
    before = train_beside(model, optimizer, plain, case.make(plain.parameters()))
    ours, exact = model.table.weight.detach() - before, plain.table.weight.detach() - before
    (figures,) = monitor.by_layer().values()
    assert figures.norm_ratio == pytest.approx(float(ours.norm() / exact.norm()), rel=1e-3)
    cosine = torch.cosine_similarity(ours.flatten(), exact.flatten(), dim=0)
    assert figures.cosine == pytest.approx(float(cosine), abs=1e-3)


def test_a_floor_is_in_both_updates():
    """It is what the policy means; figures say what is lost by sharing."""
    case = Case(AdamW, {"lr": 0.05, "weight_decay": 0.0})
    model, optimizer, monitor = watched(case, {"first_moment": Drop(), "second_moment": Factored(floor=2.0)})
    plain = Tiny()
    reference = AdamW(plain.parameters(), lr=0.05, weight_decay=0.0, betas=(0.0, 0.999))
    before = train_beside(model, optimizer, plain, reference)
    v = reference.state[plain.table.weight]["exp_avg_sq"]
    exact = -plain.table.weight.grad / ((v + 2 * v.mean(0)) / (1 - 0.999**5)).sqrt()
    ours = (model.table.weight.detach() - before) / 0.05
    (figures,) = monitor.by_layer().values()
    assert figures.norm_ratio == pytest.approx(float(ours.norm() / exact.norm()), rel=1e-3)
    assert figures.norm_ratio == pytest.approx(1.0, abs=0.1)  # without it in one: 0.55


def test_updates_are_bounded_as_steps_are():
    """Of a sketch of one bucket all rows read the first row's first moment, and are held to what their second allow."""
    model, optimizer, monitor = watched(
        Case(AdamW, {"lr": 1.0, "weight_decay": 0.0, "eps": 0.0}),
        {"first_moment": CountSketch(width=1, depth=1), "second_moment": Keep()},
    )
    before = model.table.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    model.table.weight.grad[0] = 1.0
    optimizer.step()
    moved = (model.table.weight.detach() - before).abs()
    assert 2 < moved.max() < 3  # without the bound: a million
    (figures,) = monitor.by_layer().values()
    assert figures.norm_ratio == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-4)  # exactly all move by 1


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("codec", [EXACT, DECAYS, Keep()], ids=["lazy", "by element", "kept"])
def test_what_is_left_out_as_not_finite_stays_and_is_counted(codec, sparse):
    """A row, where any state goes by rows, else an element. BFloat16 beside it: a layer that is kept is torch's."""
    codecs = {"first_moment": BFloat16(), "second_moment": codec}
    model, optimizer, monitor = watched(ADAMW, codecs, nonfinite="skip")
    for step in range(4):
        give_gradients(model, step, sparse=sparse)
        model.kept.zero_grad()
        grad = model.table.weight.grad
        if step == 2:
            model.table.weight.grad = grad = grad.coalesce() if sparse else grad
            (grad.values() if sparse else grad)[1, 2] = torch.nan
        with pytest.warns() if step == 2 else contextlib.nullcontext():
            optimizer.step()
    (figures,) = monitor.by_layer().values()
    assert figures.left_out == 1
    assert figures.errors["exp_avg_sq"] < 1e-6
    assert figures.errors["exp_avg"] < 2**-8


def test_a_step_that_a_grad_scaler_skips_changes_nothing():
    model, optimizer, monitor = watched(ADAMW, CODECS["exact"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(4):
        give_gradients(model, step)
        for param in model.parameters():
            param.grad *= scaler.scale(torch.ones(()))
        if step == 1:
            model.kept.bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert int(optimizer.state[model.table.weight]["step"]) == monitor.made == 3
    assert_exact(monitor)


def test_states_that_are_loaded_or_reset_are_taken_for_exact():
    model, optimizer, monitor = watched(ADAMW, CODECS["sketch"])
    train(model, optimizer, range(3))
    (before,) = monitor.by_layer().values()
    assert before.errors["exp_avg"] > 0.1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, [3])
    (loaded,) = monitor.by_layer().values()
    assert loaded.errors["exp_avg"] < before.errors["exp_avg"]
    reset_states(optimizer, "table.weight")
    train(model, optimizer, [4])
    assert int(optimizer.state[model.table.weight]["step"]) == 1


def test_dense_states_that_a_user_assigns_are_taken_for_exact():
    model, optimizer, monitor = watched(ADAMW, CODECS["exact"])
    train(model, optimizer, range(3))
    optimizer.state[model.table.weight]["exp_avg"] = torch.ones(30, 4)
    train(model, optimizer, range(3, 5))
    assert_exact(monitor)


def test_training_is_the_same_bits_with_a_monitor():
    codecs = CODECS["sketch"]
    model, optimizer, _ = watched(ADAMW, codecs)
    other = Tiny()
    other.load_state_dict(model.state_dict())
    plain = compress(ADAMW.make(other.parameters()), other, on_table(**codecs))
    train(model, optimizer, range(5))
    train(other, plain, range(5))
    assert torch.equal(model.table.weight, other.table.weight)
    assert report(optimizer).state == report(plain).state


def test_a_layer_without_a_gradient_has_no_figures():
    model = nn.ModuleDict({"a": nn.Embedding(9, 2), "b": nn.Embedding(9, 2)})
    monitor = Monitor(every=1)
    optimizer = compress(AdamW(model.parameters()), model, on_table(**CODECS["sketch"]), monitor=monitor)
    model["a"](torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert list(monitor.by_layer()) == ["a.weight"]


def test_of_sgd_every_codec_has_figures():
    case = Case(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True})
    for name in FOR_SGD:
        model, optimizer, monitor = watched(case, {"first_moment": CODECS[name]["first_moment"]})
        train(model, optimizer, range(3))
        assert len(monitor.by_layer()) == 1
