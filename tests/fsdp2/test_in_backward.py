"""Steps in backward under ``fully_shard``, whose gradients are averaged before they are complete."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

from lightning_sketch import compress
from tests.fsdp2.tools import held, loss_of, make_net, net_policy, train_net
from tests.ranks import run_ranks
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed


def _trained(mesh: Any, rank: int, *, in_backward: bool, micro_batches: int) -> tuple[dict[str, Any], int, list[float]]:
    """What a rank holds in the end, how many gradients there are after the last backward, and the losses."""
    model: Any = make_net(mesh)
    optimizer = compress(AdamW(model.parameters(), lr=0.02), model, net_policy(), step_in_backward=in_backward)
    if micro_batches == 1:
        losses = train_net(model, optimizer, rank, range(4))
    else:
        losses = []
        for step in range(4):
            for number in range(micro_batches):
                model.set_requires_gradient_sync(number == micro_batches - 1)
                loss = loss_of(model, rank, micro_batches * step + number)
                loss.backward()
                losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    optimizer.zero_grad()
    loss_of(model, rank, 99).backward()
    gradients = sum(param.grad is not None for param in model.parameters())
    optimizer.step()
    return held(model, optimizer), gradients, losses


def _refused(mesh: Any, rank: int) -> list[str]:
    """What clipping and accumulation that averages every micro-batch raise."""
    said = []
    model: Any = make_net(mesh)
    optimizer = compress(AdamW(model.parameters(), lr=0.02), model, net_policy(), step_in_backward=True)
    loss_of(model, rank, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, rank, 1).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for again in (optimizer.step, lambda: loss_of(model, rank, 2).backward()):
        try:
            again()
        except RuntimeError as error:
            said.append(str(error))
    return said


def everything(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    trained = {
        f"{count} {in_backward}": _trained(mesh, rank, in_backward=in_backward, micro_batches=count)
        for count in (1, 2)
        for in_backward in (True, False)
    }
    return trained | {"refused": _refused(mesh, rank)}


@functools.cache
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_is_the_ordinary_one_bit_for_bit(micro_batches: int) -> None:
    """Micro-batches that are not averaged by themselves are no accumulation: the gradient is complete once."""
    for found in ranks():
        (states, gradients, losses), (ordinary, all_gradients, same) = (
            found[f"{micro_batches} {in_backward}"] for in_backward in (True, False)
        )
        assert losses == same
        assert_same(states, ordinary)
        assert (gradients, all_gradients) == (11, 21), "the head's, the biases', and those that ranks share states of"


def test_clipping_and_a_second_gradient_raise_on_every_rank() -> None:
    for found in ranks():
        clipped, second = found["refused"]
        assert "gradients of uncompressed layers were changed after backward" in clipped
        assert "its gradient was complete a second time" in second
