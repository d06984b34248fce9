"""What layers that are stepped in backward do not go with raises, and says which layer and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, NAdam
from torch.utils.checkpoint import checkpoint

from lightning_sketch import BFloat16, Policy, Rule, compress
from tests.optimizer.in_backward_tools import loss_of, make, train
from tests.tiny import CODECS, Tiny, assert_same, on_table, snapshot

ROWS = on_table(**CODECS["rows"])


def test_a_second_backward_raises_before_it_changes_anything() -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, [0])
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"table\.weight.*second time.*accumulated"):
        loss_of(model, 2).backward()
    with pytest.raises(RuntimeError, match=r"table\.weight.*second time"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_after_zero_grad_and_step_training_goes_on() -> None:
    """The way out of a backward pass that failed half-way, or that was not followed by a step."""
    model, optimizer = make(ROWS)
    loss_of(model, 0).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="thrown away"):
        loss_of(model, 1).backward()
    optimizer.zero_grad()
    optimizer.step()
    train(model, optimizer, [2])
    assert optimizer.state[model.table.weight]["step"] == 2


def test_a_closure_that_is_evaluated_twice_raises() -> None:
    model, optimizer = make(ROWS)

    def twice() -> Tensor:
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="closures that are evaluated several times"):
        optimizer.step(twice)


def test_reentrant_checkpoints_that_share_a_layer_raise() -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = compress(AdamW(model.parameters()), model, ROWS, step_in_backward=True)
    start = torch.zeros((), requires_grad=True)
    parts = [checkpoint(lambda x: model(torch.arange(3)).sum() + x, start, use_reentrant=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        sum(parts).backward()
    assert optimizer.state[model.table.weight]["step"] == 1


def _average(params: list[nn.Parameter]) -> None:
    for param in params:
        if param.grad is not None:
            param.grad = param.grad / 2


SCALED: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 0.1),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 0.1),
    "averaged by hand": _average,
}


@pytest.mark.parametrize("how", SCALED)
def test_gradients_that_were_scaled_after_backward_raise_before_the_step_changes_anything(how: str) -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    before = snapshot(model, optimizer)
    SCALED[how](list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"did not reach table\.weight"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_norms_that_are_only_computed_do_not_raise() -> None:
    model, optimizer = make(ROWS)
    loss_of(model, 0).backward()
    clip_grad_norm_(model.parameters(), torch.inf)  # multiplies by one, as trainers do for their logs
    optimizer.step()


def test_a_grad_scaler_raises_at_its_first_step() -> None:
    model, optimizer = make(ROWS)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    assert model.kept.weight not in optimizer.state


def test_a_grad_scaler_raises_where_compressed_layers_have_no_gradient() -> None:
    """It leaves unscaling to the optimizer, which must not step anything by scaled gradients then."""
    model, optimizer = make(ROWS)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.kept(torch.ones(4)).sum()).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    assert_same(snapshot(model, optimizer), before)


def test_an_optimizer_with_nothing_to_step_in_backward_takes_a_grad_scaler() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    optimizer = compress(optimizer, model, step_in_backward=True)  # the default policy compresses larger tables
    before = model.kept.bias.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.kept(torch.ones(4)).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(before - model.kept.bias.detach(), torch.ones(3))


def test_a_scaler_that_leaves_unscaling_to_the_step_raises() -> None:
    model, optimizer = make(ROWS)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match=r"table\.weight.*GradScaler"):
        loss_of(model, 0).backward()
    assert model.table.weight not in optimizer.state


def test_an_optimizer_without_a_rule_of_ours_is_refused() -> None:
    model = Tiny()
    adamw, nadam = AdamW(model.kept.parameters()), NAdam(model.table.parameters())
    policy = Policy([Rule(role="embedding", first_moment=BFloat16())])
    with pytest.raises(ValueError, match=r"table\.weight would be stepped by the optimizer's own step"):
        compress([adamw, nadam], model, policy, step_in_backward=True)
    assert type(adamw) is AdamW
    assert type(nadam) is NAdam


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.usefixtures("process_group")
def test_ddp_is_refused_by_compress_and_at_the_first_gradient() -> None:
    model, optimizer = make(ROWS)
    wrapped = DistributedDataParallel(model)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"table\.weight: DistributedDataParallel averages"):
        wrapped(torch.arange(3)).sum().backward()
    assert_same(snapshot(model, optimizer), before)
    with pytest.raises(ValueError, match=r"table\.weight: DistributedDataParallel averages"):
        compress(AdamW(model.parameters()), wrapped, ROWS, step_in_backward=True)


@pytest.mark.distributed
@pytest.mark.usefixtures("process_group")
def test_a_process_group_alone_is_no_reason() -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, range(2))
    assert optimizer.state[model.table.weight]["step"] == 2
