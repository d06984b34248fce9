"""Optimizers that hold a converted one in an attribute of their own and delegate to it (sam#97, HamGNN#107).

Every wrapper is trained over a converted optimizer with exact codecs, and over torch's.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_sketch import compress, decompress, report
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.classes import COMPRESSED
from lightning_sketch.rules.inside import unwrap
from tests.tiny import ADAMW, EXACTLY, LOSSY, Tiny, give_gradients, train


class Wrapper(Optimizer):
    def __getstate__(self):
        return dict(vars(self))  # torch's leaves out everything of a subclass's own


class SAM(Wrapper):
    """davda54/sam, without the adaptive variant."""

    def __init__(self, params, base_optimizer=AdamW, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure=None):
        params = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for _, p in params]).norm()
        for group, p in params:
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        with torch.enable_grad():
            loss = closure()
        for _, p in params:
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class GSAM(Wrapper):
    """juntang-zhuang/GSAM: is given the optimizer, and a list of groups with the same dictionaries."""

    def __init__(self, params, rho=0.05, alpha=0.4, **kwargs):
        self.base = {"optimizer": [AdamW(params, **kwargs)]}
        super().__init__(self.base["optimizer"][0].param_groups, {"rho": rho, "alpha": alpha})

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before, old = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
        rho, alpha = (self.param_groups[0][name] for name in ("rho", "alpha"))
        norm = torch.stack([g.norm() for g in old]).norm()
        for p, g in zip(params, old, strict=True):
            p.add_(g * (rho / (norm + 1e-12)))
        with torch.enable_grad():
            loss = closure()
        for p, x, g in zip(params, before, old, strict=True):
            p.copy_(x)
            along = (p.grad * g).sum() / (p.grad.square().sum() + 1e-12)
            p.grad -= alpha * (g - along * p.grad)
        self.base["optimizer"][0].step()
        return loss


class TwoInOne(Wrapper):
    """Two optimizers over different layers; the groups are those of both."""

    def __init__(self, params, **kwargs):
        table, *others = params
        self.parts = [AdamW([table], **kwargs), SGD(others, lr=0.1, momentum=0.9)]
        super().__init__([torch.zeros(1)], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()


class Grafted(Wrapper):
    """The direction of one optimizer and the length of another's step, over the same dictionaries (Agarwal, 2020)."""

    def __init__(self, params, **kwargs):
        super().__init__(params, {})
        self.length, self.direction = SGD(self.param_groups, momentum=0.9), Adam(self.param_groups, **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in params]
        self.length.step()
        lengths = [(p - x).norm() for p, x in zip(params, before, strict=True)]
        for p, x in zip(params, before, strict=True):
            p.copy_(x)
        self.direction.step()
        for p, x, length in zip(params, before, lengths, strict=True):
            p.copy_(x + (p - x) * (length / ((p - x).norm() + 1e-12)))


class Outer(Wrapper):
    """A wrapper around a wrapper."""

    def __init__(self, params, **kwargs):
        self.sam = SAM(params, **kwargs)
        super().__init__(self.sam.param_groups, {})

    def step(self, closure=None):
        return self.sam.step(closure)


WRAPPERS = {
    SAM: lambda w: w.base_optimizer,
    GSAM: lambda w: w.base["optimizer"][0],
    TwoInOne: lambda w: w.parts[0],
    Grafted: lambda w: w.direction,
    Outer: lambda w: w.sam.base_optimizer,
}
every_wrapper = pytest.mark.parametrize("cls", WRAPPERS, ids=lambda cls: cls.__name__)


def learn(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        words, labels = torch.randperm(30, generator=generator), torch.randint(0, 3, (30,), generator=generator)

        def closure(words=words, labels=labels):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(words), labels)
            loss.backward()
            return loss

        losses.append(float(closure().detach()))
        optimizer.step(closure)
    return losses


def pair(cls: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    model = Tiny()
    plain = copy.deepcopy(model)
    return model, cls(model.parameters(), lr=0.05), plain, cls(plain.parameters(), lr=0.05)


def assert_equal_weights(model: nn.Module, plain: nn.Module) -> None:
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("converted_at", [0, 3])
@every_wrapper
def test_a_wrapper_trains_as_over_torch_s_optimizer(cls, converted_at):
    model, wrapper, plain, stock = pair(cls)
    learn(model, wrapper, range(converted_at))
    inner = compress(WRAPPERS[cls](wrapper), model, EXACTLY)
    learn(model, wrapper, range(converted_at, 6))
    learn(plain, stock, range(6))
    assert_equal_weights(model, plain)
    assert isinstance(inner, CompressedOptimizer)
    assert any(key.endswith("_table") for key in inner.state[model.table.weight])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@every_wrapper
def test_a_copied_wrapper_trains_on_like_the_original(cls, way):
    model, wrapper, _, _ = pair(cls)
    compress(WRAPPERS[cls](wrapper), model, EXACTLY)
    learn(model, wrapper, range(2))
    twin, its = way((model, wrapper))
    learn(twin, its, range(2, 4))
    learn(model, wrapper, range(2, 4))
    assert_equal_weights(twin, model)


def test_sam_links_its_groups_anew_when_it_loads():
    """Its checkpoint has no moments, so torch's SAM begins with new ones, and so does ours."""
    model, wrapper, plain, stock = pair(SAM)
    compress(wrapper.base_optimizer, model, EXACTLY)
    for net, optimizer in ((model, wrapper), (plain, stock)):
        learn(net, optimizer, range(2))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.base_optimizer.param_groups is optimizer.param_groups
        learn(net, optimizer, range(2, 4))
    assert_equal_weights(model, plain)


def test_a_wrapper_whose_groups_are_those_of_before_a_load_goes_on_as_torch_s():
    model, wrapper, plain, stock = pair(SAM)
    compress(wrapper.base_optimizer, model, EXACTLY)
    for net, optimizer in ((model, wrapper), (plain, stock)):
        learn(net, optimizer, range(2))
        base = optimizer.base_optimizer
        base.load_state_dict(copy.deepcopy(base.state_dict()))
        assert base.param_groups[0] is not optimizer.param_groups[0]
        learn(net, optimizer, range(2, 4))
    assert_equal_weights(model, plain)


@pytest.mark.parametrize("cls", [SAM, GSAM, Outer], ids=lambda cls: cls.__name__)
def test_the_wrapper_may_be_passed_in_place_of_the_optimizer_inside(cls):
    model, wrapper, _, _ = pair(cls)
    inner = WRAPPERS[cls](wrapper)
    assert unwrap(wrapper) is inner
    assert compress(wrapper, model, LOSSY) is wrapper
    assert type(inner) is COMPRESSED[AdamW]
    learn(model, wrapper, range(2))
    assert report(wrapper).state_by_codec["CountSketch"]
    assert decompress(wrapper) is wrapper
    assert type(inner) is AdamW
    learn(model, wrapper, range(2, 4))


@pytest.mark.parametrize(("cls", "inside"), [(TwoInOne, "parts, parts"), (Grafted, "direction, length")])
def test_of_several_inside_one_must_be_named(cls, inside):
    model, wrapper, _, _ = pair(cls)
    for function in (lambda: compress(wrapper, model, LOSSY), lambda: decompress(wrapper)):
        with pytest.raises(TypeError, match=f"{cls.__name__} holds several optimizers, in {inside}; pass one"):
            function()


def test_an_optimizer_beside_a_model_s_own_is_not_inside():
    """A subclass that steps itself, and holds another for other parameters, is the one that is meant."""
    model = Tiny()
    own = type("Custom", (AdamW,), {})(model.parameters())
    own.helper = SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=r"CountSketch cannot hold exp_avg of .*: there is no update rule for Custom"):
        compress(own, model, LOSSY)
    assert type(own.helper) is SGD


@pytest.mark.parametrize("groups", [list, lambda groups: [dict(group) for group in groups]], ids=["same", "equal"])
def test_one_that_took_our_groups_and_steps_itself_is_refused_while_ours_is_alive(groups):
    """As DeepSpeedCPUAdam does under Accelerate's optimizer offload."""
    model = Tiny()
    optimizer = compress(ADAMW.make(model.parameters()), model, LOSSY)
    foreign = AdamW(groups(optimizer.param_groups))
    give_gradients(model, 0)
    before = model.table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="AdamW steps parameter groups that lightning_sketch compressed"):
        foreign.step()
    assert torch.equal(model.table.weight, before)
    train(model, optimizer, [0])


def test_one_with_groups_of_its_own_steps_beside_ours():
    model = Tiny()
    groups = [{"params": list(model.parameters())}]
    beside = SGD([dict(group) for group in groups])
    optimizer = compress(AdamW(groups), model, LOSSY)
    train(model, optimizer, [0])
    train(model, beside, [1])
