"""Layers that are alike make their steps together on accelerators, and end where layers stepped one by one do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_sketch import Policy, Rule, compress, kernels
from lightning_sketch.rules import alike, layer_step
from lightning_sketch.sharding import gradient
from tests.tiny import CASES, CODECS, FOR_SGD, Case

SHAPES = ((11, 30),) * 3 + ((7, 30),) * 2 + ((5,),) * 2 + ((4, 3),)


#: Lazy codecs look for rows without a gradient, layer by layer.
TOGETHER = [name for name in CODECS if name != "exact"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each batch has. Operations that `torch.vmap` would launch once for each layer are errors."""
    seen: list[int] = []
    stepped = alike.step_together
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: None)
    for module in (layer_step, gradient):  # the CPU is asked; an accelerator is not waited for
        monkeypatch.setattr(module, "all_finite", lambda values: False)
    monkeypatch.setattr(alike, "step_together", lambda rule, layers: seen.append(len(layers)) or stepped(rule, layers))
    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield seen
    torch._C._functorch._set_vmap_fallback_enabled(enabled)


def _trained(case: Case, codecs: str, *, dtype: torch.dtype = torch.float32, bad: bool = False) -> list[torch.Tensor]:
    """Parameters and states after a few steps."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES)
    rules = [Rule(name="*", **CODECS[codecs])]
    optimizer = compress(case.make(model.parameters()), model, Policy(rules), nonfinite="skip")
    for step in range(4):
        for i, param in enumerate(model):
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            if bad and (i + step) % 3 == 0:
                param.grad.view(-1)[step] = torch.nan
        optimizer.step()
    states = [optimizer.state[param] for param in model]
    return [*model, *(value for state in states for _, value in sorted(state.items()))]


def _assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        if one.dtype == torch.uint8:  # a code may be the next one
            assert (one.int() - other.int()).abs().float().mean() < 0.05
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_stepped_together_end_where_they_end_one_by_one(case, batches, monkeypatch):
    for name in FOR_SGD if case.cls is torch.optim.SGD else TOGETHER:
        if name not in TOGETHER:
            continue
        expected = _trained(case, name)
        assert not batches
        with monkeypatch.context() as patch:
            patch.setattr(alike, "pays", lambda device: True)
            found = _trained(case, name)
        assert sorted(batches[:3]) == [2, 2, 3], name
        batches.clear()
        _assert_close(found, expected)


@pytest.mark.parametrize("name", TOGETHER)
def test_each_layer_leaves_out_its_own_rows(name, batches, monkeypatch):
    expected = _trained(CASES[0], name, bad=True)
    monkeypatch.setattr(alike, "pays", lambda device: True)
    _assert_close(_trained(CASES[0], name, bad=True), expected)
    assert batches
