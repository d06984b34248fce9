"""Numbers that stay on a CUDA device, which is a fake one: steps wait for nothing, and find their numbers there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, RMSprop, SparseAdam

from benchmarks.launches import CountLaunches, counting
from lightning_sketch import (
    CountSketch,
    Factored,
    compress,
)
from lightning_sketch.codecs import scale_tensor
from lightning_sketch.layers.step_count import step_tensor
from lightning_sketch.optimizer.bindings import Bindings
from tests.tiny import CODECS, FOR_SGD, on_table
from tests.torch_versions import fake_bytes_are_indices


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
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=fake_bytes_are_indices if name == "quantized" else ())
        for name in FOR_SGD
        if name not in ("exact", "rows")
    ],
)
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


def test_of_hyperparameters_only_the_learning_rate_may_be_on_the_device(cuda: CountLaunches) -> None:
    _, optimizer = _on(cuda, CUDA["AdamW, capturable"], second_moment=Factored())
    optimizer.param_groups[0]["betas"] = (0.9, torch.full((), 0.99, device="cuda"))
    with pytest.raises(ValueError, match="betas is a tensor on a device, and weight is compressed"):
        optimizer.step()
    assert not optimizer.state
