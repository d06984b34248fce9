"""Which states an optimizer keeps is learned from a step of its own."""

from __future__ import annotations

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress, plan, report
from lightning_sketch.rules.stock_probe import learn
from tests.stock.optimizers import BF16, NADAM, Matrices
from tests.tiny import give_gradients, train

SIGNED, POSITIVE, WEIGHTS = "signed", "positive", "weights"


@pytest.mark.parametrize(
    ("cls", "states", "count"),
    [
        (torch.optim.NAdam, {"exp_avg": SIGNED, "exp_avg_sq": POSITIVE}, "tensor"),
        (torch.optim.Adamax, {"exp_avg": SIGNED, "exp_inf": POSITIVE}, "tensor"),
        (torch.optim.Adadelta, {"square_avg": POSITIVE, "acc_delta": POSITIVE}, "tensor"),
        (torch.optim.Rprop, {"prev": SIGNED, "step_size": POSITIVE}, "tensor"),
        (torch.optim.ASGD, {"ax": WEIGHTS}, "tensor"),
        (torch.optim.Muon, {"momentum_buffer": SIGNED}, "none"),
        (torch.optim.Adafactor, {}, "tensor"),
        (pytorch_optimizer.Lion, {"exp_avg": SIGNED}, "none"),
        (pytorch_optimizer.ScheduleFreeAdamW, {"z": WEIGHTS, "exp_avg_sq": POSITIVE}, "none"),
        (pytorch_optimizer.AdaBelief, {"exp_avg": SIGNED, "exp_avg_var": POSITIVE}, "none"),
    ],
)
def test_names_and_kinds(cls, states, count):
    model = Matrices()
    optimizer = cls(model.parameters())
    found = learn(optimizer, optimizer.param_groups[0], model.table.weight)
    assert {s.name: WEIGHTS if s.weights else SIGNED if s.signed else POSITIVE for s in found.states} == states
    assert found.count == count
    assert not optimizer.state


def test_a_plan_on_the_meta_device_shows_them():
    with torch.device("meta"):
        model = Matrices()
    optimizer = torch.optim.Adamax(model.parameters())
    table = plan(model, optimizer, BF16).layers[0]
    assert table.bytes_before == {"exp_avg": 480, "exp_inf": 480}
    assert table.bytes_after == {"exp_avg": 240, "exp_inf": 240}


def test_states_are_named_in_rules(tmp_path):
    policy = Policy([Rule(name="table.*", states={"exp_inf": "BFloat16"})])
    assert Policy.from_dict(policy.to_dict()) == policy
    assert policy.to_dict()["rules"][0]["states"] == {"exp_inf": {"codec": "BFloat16", "stochastic": True}}
    (tmp_path / "policy.yaml").write_text("rules:\n  - name: table.*\n    states: {exp_inf: BFloat16}\n")
    assert Policy.from_yaml(tmp_path / "policy.yaml") == policy
    assert eval(repr(policy.rules[0]), {"Rule": Rule, "BFloat16": BFloat16}) == policy.rules[0]
    assert hash(policy.rules[0]) == hash(Policy.from_dict(policy.to_dict()).rules[0])
    model = Matrices()
    optimizer = compress(torch.optim.Adamax(model.parameters()), model, policy)
    train(model, optimizer, range(2))
    entry = optimizer.state[model.table.weight]
    assert (entry["exp_avg"].dtype, entry["exp_inf"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("states", [{"exp_avg": BFloat16()}, {"exp_inf": None}, {"exp_inf": "Nothing"}, ["exp_inf"]])
def test_what_is_no_codec_of_a_named_state_is_refused(states):
    with pytest.raises(ValueError, match=r"Rule\(|unknown codec|Nothing"):
        Rule(states=states)


def test_a_state_that_the_optimizer_does_not_keep_is_refused():
    model = Matrices()
    policy = Policy([Rule(name="table.*", states={"exp_info": "BFloat16"})])
    with pytest.raises(ValueError, match=r"gives codecs for exp_info, but this optimizer keeps exp_avg, exp_inf"):
        compress(torch.optim.Adamax(model.parameters()), model, policy)


def test_a_codec_that_is_not_elementwise_is_refused_with_what_to_use():
    model = Matrices()
    optimizer = torch.optim.Adamax(model.parameters())
    reason = (
        r"RowWise cannot hold exp_inf of table.weight: there is no update rule for Adamax, so its own step works on "
        r"decoded states, and those must be stored element by element: use BFloat16\(\), Quantized\(\), or Keep\(\)"
    )
    with pytest.raises(ValueError, match=reason):
        compress(optimizer, model, Policy([Rule(name="table.*", second_moment=RowWise())]))
    assert type(optimizer) is torch.optim.Adamax


class Eager(torch.optim.Optimizer):
    """Allocates in its constructor."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"] = torch.full_like(param, 0.5)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                total = self.state[param]["sum"].addcmul_(param.grad, param.grad)
                param.addcdiv_(param.grad, total.sqrt(), value=-group["lr"])


def test_states_that_a_constructor_allocates_are_encoded_at_once():
    model = Matrices()
    optimizer = compress(Eager(model.parameters()), model, Policy([Rule(sum="BFloat16")]))
    entry = optimizer.state[model.table.weight]
    assert entry["sum"].dtype == torch.bfloat16
    assert (entry["sum"] == 0.5).all()
    train(model, optimizer, range(2))
    assert (optimizer.state[model.table.weight]["sum"].float().mean()) > 1


class Cuda(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        raise RuntimeError("no kernel image")


class Holding(torch.optim.NAdam):
    def __init__(self, params):
        params = list(params)
        super().__init__(params)
        self.everything = params


@pytest.mark.parametrize(("cls", "reason"), [
    (Cuda, "Cuda cannot be compressed: a step of it with a small parameter, .* ended in RuntimeError: no kernel image"),
    (torch.optim.LBFGS, "LBFGS cannot be compressed: it holds its parameters in its attribute '_params', too"),
    (Holding, "Holding cannot be compressed: it holds its parameters in its attribute 'everything'"),
])  # fmt: skip
def test_what_cannot_be_tried_is_refused(cls, reason):
    model = Matrices()
    optimizer = cls(model.parameters())
    with pytest.raises(TypeError, match=reason):
        compress(optimizer, model, BF16)
    assert type(optimizer) is cls


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_that_decoded_states_do_not_serve_are_refused(flag):
    model = Matrices()
    optimizer = NADAM.make(model.parameters())
    optimizer.param_groups[0][flag] = True
    with pytest.raises(ValueError, match=f"{flag}=True is not supported for compressed layers, and table.weight is"):
        compress(optimizer, model, BF16)


def test_other_shapes_may_have_other_states():
    """CAME factors matrices, and keeps the squares of vectors."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.ones(200, 150)), nn.Parameter(torch.ones(200))

    model = Both()
    optimizer = pytorch_optimizer.CAME(model.parameters())
    compress(optimizer, model, Policy([Rule(first_moment="BFloat16", second_moment="BFloat16")]))
    give_gradients(model, 0)
    optimizer.step()
    matrix, vector = optimizer.state[model.matrix], optimizer.state[model.vector]
    assert matrix["exp_avg"].dtype == vector["exp_avg"].dtype == vector["exp_avg_sq"].dtype == torch.bfloat16
    assert "exp_avg_sq" not in matrix
    assert matrix["exp_avg_sq_row"].dtype == torch.float32
    held = sum(x.nbytes for state in (matrix, vector) for x in state.values())
    assert report(optimizer).state == held, "counted once"
