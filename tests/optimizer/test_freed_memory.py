"""Nothing that an optimizer remembers keeps gradients, states or parameters alive."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_sketch import Policy, RowWise, Rule, compress, decompress
from tests.optimizer.layers_tools import give, make_layers
from tests.tiny import CODECS


def test_a_gradient_is_free_after_the_step():
    model, optimizer = make_layers()
    give(model, 0)
    references = [weakref.ref(param.grad) for param in model.parameters()]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(reference() is not None for reference in references)


@pytest.mark.parametrize("how", ["load", "decompress"])
def test_states_that_were_replaced_are_free(how):
    model, optimizer = make_layers()
    give(model, 0)
    optimizer.step()
    states = [v for p in optimizer.state if p is not model.kept.weight for v in optimizer.state[p].values()]
    references = [weakref.ref(value) for value in states if isinstance(value, Tensor) and value.ndim]
    del states
    if how == "load":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        decompress(optimizer)
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_layers_that_are_gone_are_forgotten():
    model, optimizer = make_layers()
    give(model, 0)
    optimizer.step()
    before = len(optimizer.compression.bindings)
    reference = weakref.ref(model.l0.weight)
    optimizer.state.clear()
    group = optimizer.param_groups[0]
    place = next(i for i, param in enumerate(group["params"]) if param is model.l0.weight)
    del group["params"][place], group["compression"][place], model.l0
    optimizer.step()
    gc.collect()
    assert len(optimizer.compression.bindings) == before - 1
    assert reference() is None


def test_a_replaced_parameter_is_forgotten_beside_kept_layers():
    """As where a vocabulary is resized. Kept layers have states too."""
    model = nn.Sequential(nn.Embedding(20, 8), *(nn.Linear(8, 8) for _ in range(3)))
    optimizer = compress(AdamW(model.parameters()), model, Policy([Rule(name="0.weight", second_moment=RowWise())]))

    def step():
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()

    step()
    old = model[0].weight
    new = nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][0] = model[0].weight = new
    optimizer.state[new] = optimizer.state.pop(old)
    reference = weakref.ref(old)
    del old
    step()
    gc.collect()
    assert reference() is None
    assert len(optimizer.compression.bindings) == 1

    state = weakref.ref(optimizer.state.pop(new)["exp_avg_sq_row"])
    new.requires_grad_(False)
    new.grad = None
    for param in model[1:].parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    gc.collect()
    assert state() is None


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_memory_is_free_as_soon_as_states_are_moved_away(codecs):
    layer = nn.Embedding(60, 8)
    optimizer = torch.optim.AdamW(layer.parameters())
    compress(optimizer, layer, Policy([Rule(name="*", **codecs)]))
    layer.weight.grad = torch.randn(60, 8)
    optimizer.step()
    state = optimizer.state[layer.weight]
    held = {key: weakref.ref(x) for key, x in state.items() if torch.is_tensor(x) and x.ndim}
    for key in held:
        state[key] = state[key].clone()  # as offloading does
    gc.collect()
    assert held
    assert not [key for key, reference in held.items() if reference() is not None]
    optimizer.step()
