"""A hyperparameter that switches a state off leaves it as it is, and finds it again, as in torch.

Momentum schedules and resumed phases of training set ``group["momentum"]`` to 0 for some steps.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, RMSprop

from lightning_sketch import compress, kernels
from tests.tiny import EXACTLY, Case, Tiny, assert_same, on_table, train

SGD_PLAIN = Case(SGD, {"lr": 0.1, "momentum": 0.9})
SGD_DAMPED = Case(SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1})
SGD_NESTEROV = Case(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True})
RMSPROP = Case(RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5})
SWITCHES = [
    pytest.param(SGD_PLAIN, "momentum", 0.0, id="SGD"),
    pytest.param(SGD_DAMPED, "momentum", 0.0, id="SGD with dampening"),
    pytest.param(SGD_NESTEROV, "momentum", 0.0, id="Nesterov"),
    pytest.param(RMSPROP, "momentum", 0.0, id="RMSprop's momentum"),
    pytest.param(RMSPROP, "centered", False, id="RMSprop, centered"),
]


@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("codecs", ["exact", "bfloat16"])
@pytest.mark.parametrize(("case", "switch", "off"), SWITCHES)
def test_a_state_that_was_switched_off_is_found_as_it_was(case, switch, off, codecs, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(kernels, "fused_kernel", lambda device: None)
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, stock = case.make(model.parameters()), case.make(plain.parameters())
    policy = EXACTLY if codecs == "exact" else on_table(first_moment="BFloat16", second_moment="BFloat16")
    if case.cls is SGD and codecs == "bfloat16":
        policy = on_table(first_moment="BFloat16")
    compress(optimizer, model, policy)
    on = case.kwargs[switch]
    for step in range(9):
        before = copy.deepcopy(optimizer.state[model.table.weight]) if 3 < step < 6 else None
        for o in (optimizer, stock):
            o.param_groups[0][switch] = off if 3 <= step < 6 else on
        train(model, optimizer, [step])
        train(plain, stock, [step])
        if before is not None:
            name = "grad_avg" if switch == "centered" else "momentum_buffer"
            now = optimizer.state[model.table.weight]
            assert_same(*({k: v for k, v in state.items() if k.startswith(name)} for state in (now, before)))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if codecs == "exact" else {"rtol": 0, "atol": 0.1}
    torch.testing.assert_close(model.table.weight, plain.table.weight, **tolerance)
