"""States that are encoded badly in the middle of training are named, once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_sketch import BFloat16, CountSketch, Drop, compress, restore
from lightning_sketch.optimizer.lossy import LOSSY
from tests.ranks import run_ranks
from tests.tiny import ADAMW, Tiny, on_table, train

ROWS = 60
HARSH = on_table(first_moment=CountSketch(10), second_moment=CountSketch(10))
MILD = on_table(first_moment=BFloat16(), second_moment=BFloat16())
DROPPED = on_table(first_moment=Drop(), second_moment=BFloat16())


def started(policy: Any = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Tiny(ROWS)
    optimizer = ADAMW.make(model.parameters())
    if policy is not None:
        compress(optimizer, model, policy)
    return model, optimizer


def trained(policy: Any = None) -> tuple[Any, Any]:
    model, optimizer = started(policy)
    train(model, optimizer, range(3))
    return model, optimizer


def warned(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lightning_sketch.optimizer.lossy"]


def assert_named(caplog: Any, errors: dict[str, float]) -> None:
    (message,) = warned(caplog)
    for state, error in errors.items():
        assert error > LOSSY
        assert f"table.weight: {state} in CountSketch, relative error {error:.2g}" in message
    assert "Choose a milder codec" in message
    assert "reset_states(optimizer, layers=[...])" in message
    assert all(record.levelno == logging.WARNING for record in caplog.records)  # shown without configuration


def test_compress_in_the_middle_of_training(caplog):
    model, optimizer = trained()
    compress(optimizer, model, HARSH)
    assert_named(caplog, optimizer.compression.errors["table.weight"])


def test_a_dense_checkpoint(caplog):
    optimizer = started(HARSH)[1]
    optimizer.load_state_dict(trained()[1].state_dict())
    assert_named(caplog, optimizer.compression.errors["table.weight"])


def test_restore_under_another_policy(caplog, tmp_path):
    torch.save(trained(MILD)[1].state_dict(), tmp_path / "checkpoint.pt")
    errors = restore(started(HARSH)[1], tmp_path / "checkpoint.pt")
    assert_named(caplog, errors["table.weight"])


def test_nothing_is_said_of_good_encodings_of_first_steps_or_of_what_was_dropped(caplog, tmp_path):
    started(HARSH)
    model, optimizer = trained()
    saved = optimizer.state_dict()
    compress(optimizer, model, DROPPED)
    assert optimizer.compression.errors["table.weight"]["exp_avg"] == 1.0
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
    fresh = started(MILD)[1]
    fresh.load_state_dict(saved)
    # A first moment that the checkpoint does not have starts at zero.
    assert restore(started(MILD)[1], tmp_path / "checkpoint.pt")["table.weight"]["exp_avg"] == 1.0
    assert warned(caplog) == []


def on_rank(rank: int, world_size: int) -> dict[str, list[str]]:
    """What a rank says of a replica, and of its rows of a sharded table."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning_sketch.optimizer.lossy").addHandler(handler)
    found: dict[str, list[str]] = {}
    model, optimizer = trained()
    compress(optimizer, model, HARSH)
    found["replica"], messages[:] = list(messages), []

    mesh = init_device_mesh("cpu", (world_size,))
    model = Tiny(ROWS)
    table = distribute_tensor(model.table.weight.detach(), mesh, [Shard(0)])
    model.table.weight = nn.Parameter(table)
    optimizer = ADAMW.make([model.table.weight], foreach=False)
    # Rank one's rows have had no gradient yet, so that nothing of theirs is lost.
    model.table.weight.grad = torch.zeros_like(table)
    if rank == 0:
        model.table.weight.grad.to_local().normal_()
    optimizer.step()
    compress(optimizer, model, HARSH)
    found["shard"] = list(messages)
    return found


@pytest.mark.distributed
def test_rank_zero_speaks_of_replicas_and_every_rank_of_its_own_shard():
    ranks = run_ranks(on_rank, 2)
    assert [len(rank["replica"]) for rank in ranks] == [1, 0]
    assert [len(rank["shard"]) for rank in ranks] == [1, 0]
    assert "table.weight: exp_avg in CountSketch" in ranks[0]["shard"][0]
