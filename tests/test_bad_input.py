"""Bad input: refused with a name and a way out, before anything changes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, RMSprop

from lightning_sketch import CountSketch, Policy, RowWise, Rule, compress, decompress, plan, report
from tests.tiny import ADAM, CASES, CODECS, EXACTLY, LOSSY, Tiny, assert_same, give_gradients, snapshot, train


class Duck:
    """Looks like an optimizer."""

    def __init__(self, params):
        self.param_groups, self.state = [{"params": list(params)}], {}

    def step(self):
        raise AssertionError

    def zero_grad(self):
        raise AssertionError


class Sharding(torch.optim.Optimizer):
    """An optimizer around one that it builds itself, as ZeroRedundancyOptimizer has it in ``optim``."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.optim = Adam(self.param_groups[0]["params"])


@pytest.mark.parametrize("function", [lambda m, o: compress(o, m, LOSSY), lambda m, o: plan(m, o, LOSSY)])
@pytest.mark.parametrize("cls", [LBFGS, Sharding])
def test_an_optimizer_that_cannot_be_tried_is_refused(cls, function):
    model = Tiny()
    optimizer = cls(model.parameters())
    with pytest.raises(
        TypeError, match=rf"{cls.__name__} cannot be compressed: (it holds its parameters|a step of it)"
    ):
        function(model, optimizer)
    assert type(optimizer) is cls


@pytest.mark.parametrize("function", [lambda o: compress(o, Tiny(), LOSSY), decompress, report])
@pytest.mark.parametrize("thing", [Duck(Tiny().parameters()), None, Tiny()], ids=["duck", "None", "model"])
def test_what_is_no_optimizer_is_refused(thing, function):
    with pytest.raises(TypeError, match=rf"expected a torch.optim.Optimizer, got {type(thing).__name__}"):
        function(thing)


def complex_model():
    return nn.ParameterDict({"w": nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))})


def twice(model):
    optimizer = Adam(model.parameters())
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model.table.weight]})
    return optimizer


COMPLEX = Policy([Rule(name="w", second_moment=RowWise())])


@pytest.mark.parametrize(
    ("model", "make", "policy", "message"),
    [
        (
            Tiny,
            lambda m: Adam(Tiny().parameters()),
            LOSSY,
            r"parameter 0 of group 0 \(shape \[30, 4\]\) is not a paramet",
        ),
        (Tiny, twice, LOSSY, r"table.weight is in the optimizer twice; remove it from one of the groups"),
        (Tiny, None, Policy([Rule(name="tabel.*")]), r"rule 1 \(name='tabel.\*'\) matched no parameter; nearest is"),
        (complex_model, None, COMPLEX, r"w is complex; compressed layers must be real: let the policy keep it"),
        (Tiny, lambda m: SGD(m.parameters(), 0.1), LOSSY, r"keeps no state at all \(is momentum 0\?\)"),
    ],
    ids=["foreign", "twice", "unmatched", "complex", "stateless"],
)
@pytest.mark.filterwarnings("ignore:optimizer contains")
def test_a_model_and_a_policy_that_do_not_fit_change_nothing(model, make, policy, message):
    model = model()
    optimizer = make(model) if make else Adam(model.parameters())
    cls, groups = type(optimizer), [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        compress(optimizer, model, policy)
    assert type(optimizer) is cls
    assert [group.keys() for group in optimizer.param_groups] == [group.keys() for group in groups]


def test_a_complex_parameter_may_be_kept():
    model = nn.ModuleDict({"table": nn.Embedding(9, 2)})
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = compress(Adam(model.parameters()), model, LOSSY)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[model.phase]["exp_avg"].is_complex()


@pytest.mark.parametrize("make", [lambda: CountSketch(width=0), lambda: CountSketch(compression=0.5), lambda:
                                  CountSketch(depth=0), lambda: RowWise(compression=0)])  # fmt: skip
def test_a_sketch_without_room_is_refused_when_it_is_made(make):
    with pytest.raises(ValueError, match=r"\((width|compression|depth)=[0.5]+\): must be (>= 1|in \[1, 2\*\*31\))"):
        make()


@pytest.mark.parametrize("nonfinite", ["ignore", None, True])
def test_what_to_do_about_nan_is_one_of_three(nonfinite):
    model = Tiny()
    with pytest.raises(ValueError, match=r"nonfinite=.*: must be 'raise', 'skip' or 'propagate'"):
        compress(Adam(model.parameters()), model, LOSSY, nonfinite=nonfinite)


# -- gradients -------------------------------------------------------------------------------------------------------


def poison(param, value):
    grad = param.grad
    (grad._values() if grad.is_sparse else grad)[0, 0] = value


BAD = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def without_first_row(param):
    """The same gradient without the row that `poison` spoiled."""
    grad = param.grad.coalesce() if param.grad.is_sparse else param.grad
    rows = grad.indices()[0] if grad.is_sparse else torch.arange(len(param))
    values = grad.values() if grad.is_sparse else grad
    good = values.isfinite().all(dim=1)
    param.grad = torch.sparse_coo_tensor(rows[good][None], values[good], param.shape, is_coalesced=True)


@BAD
@every_case
def test_a_row_that_is_not_finite_raises_after_everything_else_is_stepped(case, value):
    model = Tiny()
    twin = copy.deepcopy(model)
    optimizer = compress(case.make(model.parameters()), model, LOSSY)
    undisturbed = compress(case.make(twin.parameters()), twin, LOSSY)
    for m, o in ((model, optimizer), (twin, undisturbed)):
        train(m, o, range(2), sparse=case.sparse)
        give_gradients(m, 9, sparse=case.sparse)
        poison(m.table.weight, value)
    without_first_row(twin.table.weight)
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(
        FloatingPointError,
        match=r"NaN or inf in the gradient of table.weight \(1 row\)\. They were left out: parameters and states did "
        r"not change there\. Everything else was stepped",
    ):
        optimizer.step()
    undisturbed.step()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    for m, o in ((model, optimizer), (twin, undisturbed)):
        train(m, o, range(2, 4), sparse=case.sparse)
    assert_same(snapshot(model, optimizer), snapshot(twin, undisturbed))


@BAD
@every_case
def test_skip_warns_once_and_counts_the_steps(case, value):
    model = Tiny()
    everything = Policy([Rule(role="embedding", **CODECS["sketch"]), Rule(role="hidden", **CODECS["sketch"])])
    optimizer = compress(case.make(model.parameters()), model, everything, nonfinite="skip")
    train(model, optimizer, range(2), sparse=case.sparse)
    for times in (1, 2):
        before = snapshot(model, optimizer)
        give_gradients(model, 9, sparse=case.sparse)
        poison(model.table.weight, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        messages = [str(w.message) for w in caught]
        expected = ["NaN or inf in the gradient of table.weight: 1 row left out of the step"]
        assert messages == (expected if times == 1 else [])  # said once, counted always
        assert all(w.filename == __file__ for w in caught), "it points to who called step"
        assert report(optimizer).skipped == {"table.weight": times}
        after = snapshot(model, optimizer)
        assert all(not torch.equal(after[name], before[name]) for name in ("kept.weight", "kept.bias", "table.weight"))
    assert all(bool(torch.as_tensor(x).isfinite().all()) for x in after.values())


def test_every_bad_layer_is_named():
    model = Tiny()
    optimizer = compress(
        Adam(model.parameters()), model, Policy([Rule(role=("embedding", "hidden"), exp_avg_sq="RowWise")])
    )
    give_gradients(model, 0)
    poison(model.table.weight, torch.nan)
    poison(model.kept.weight, torch.inf)
    with pytest.raises(FloatingPointError, match=r"gradient of table.weight \(1 row\), kept.weight \(1 row\)\. "):
        optimizer.step()


def test_propagated_nan_spreads_as_in_torch():
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer = compress(ADAM.make(model.parameters()), model, EXACTLY, nonfinite="propagate")
    stock = ADAM.make(plain.parameters())
    for m, o in ((model, optimizer), (plain, stock)):
        give_gradients(m, 0)
        poison(m.table.weight, torch.nan)
        o.step()
    assert model.table.weight.isnan().sum() == 1
    torch.testing.assert_close(model.table.weight, plain.table.weight, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert not report(optimizer).skipped


def test_a_non_finite_gradient_of_a_kept_layer_is_torch_s_affair():
    model = Tiny()
    optimizer = compress(ADAM.make(model.parameters()), model, LOSSY)
    give_gradients(model, 0)
    poison(model.kept.weight, torch.nan)
    optimizer.step()
    assert model.kept.weight.isnan().sum() == 1
    assert model.table.weight.isfinite().all()


def test_gradients_that_are_sparse_within_rows_are_refused_before_anything_changes():
    model = Tiny()  # torch itself refuses CSR gradients of dense parameters
    optimizer = compress(ADAM.make(model.parameters()), model, LOSSY)
    train(model, optimizer, [0])
    before = snapshot(model, optimizer)
    grad = model.table.weight.grad = torch.ones(30, 4).to_sparse()
    with pytest.raises(TypeError, match=r"table.weight is sparse in 2 dimensions; only row-sparse gradients"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    assert model.table.weight.grad is grad


def test_a_parameter_of_another_shape_under_the_same_name_is_refused():
    model = Tiny()
    optimizer = compress(ADAM.make(model.parameters()), model, LOSSY)
    train(model, optimizer, [0])
    model.table.weight.data = torch.ones(31, 4)
    give_gradients(model, 1)
    kept = model.kept.weight.detach().clone()
    with pytest.raises(ValueError, match=r"table.weight now has shape \[31, 4\], .* laid out for \[30, 4\]; compress"):
        optimizer.step()
    assert torch.equal(model.kept.weight, kept)


@pytest.mark.parametrize(
    ("change", "state"), [({"momentum": 0.9}, "momentum_buffer"), ({"centered": True}, "grad_avg")]
)
def test_a_state_that_was_not_laid_out_is_not_left_out_silently(change, state):
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, stock = compress(RMSprop(model.parameters()), model, EXACTLY), RMSprop(plain.parameters())
    for o in (optimizer, stock):
        o.param_groups[0].update(change)
    give_gradients(model, 0)
    before = snapshot(model, optimizer)
    with pytest.raises(
        ValueError, match=rf"table.weight was compressed without {state}, .* now ask for; call decompre"
    ):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    compress(decompress(optimizer), model, EXACTLY)
    train(model, optimizer, range(3))
    train(plain, stock, range(3))
    torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-5, atol=1e-6)
