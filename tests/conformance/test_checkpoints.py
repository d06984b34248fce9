"""Training that was saved and loaded goes on bit for bit."""

from __future__ import annotations

import io
from typing import Any

import torch

from tests.conformance.cases import OPTIMIZERS, PARTS, Case, every, give
from tests.tiny import assert_same


def saved_and_loaded(value: Any) -> Any:
    """Through a file, as primitives and tensors alone."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every(OPTIMIZERS)
def test_a_fresh_optimizer_makes_the_same_next_steps(case: Case) -> None:
    (shard,) = case.shards
    first, *others = case.gradients(shard, steps=4)
    model, optimizer = case.converted(torch.ones(shard.local_shape))
    for gradient in (first, others[0]):
        give(model, gradient)
        optimizer.step()
    saved = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, loaded = case.converted(torch.zeros(shard.local_shape))
    other.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    assert_same(saved_and_loaded(loaded.state_dict()), saved["optimizer"])
    for gradient in others[1:]:
        for each, its in ((model, optimizer), (other, loaded)):
            give(each, gradient)
            its.step()
    assert torch.equal(other.weight, model.weight)
    assert_same(loaded.state_dict(), optimizer.state_dict())


@every(PARTS, lambda case: case.layout != "whole")
def test_a_part_of_a_layer_is_what_is_stored_of_it(case: Case) -> None:
    for shard in case.shards:
        first, second, third = case.gradients(shard)
        part, other = case.part(shard), case.part(shard)
        part.step(*first), part.step(*second)
        other.load(saved_and_loaded(part.snapshot()), steps=part.steps)
        part.step(*third), other.step(*third)
        assert_same(other.snapshot(), part.snapshot())
