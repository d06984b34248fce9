"""torch's ZeroRedundancyOptimizer is refused, and the optimizer inside it at the first step, on all ranks alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_sketch import compress
from tests.ranks import run_ranks
from tests.tiny import LOSSY, Tiny, assert_same, give_gradients, snapshot

WORLD = 2


def refusals(rank: int, world_size: int) -> dict[str, Any]:
    model = Tiny()
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    found: dict[str, Any] = {"owned": len(zero.optim.param_groups[0]["params"])}
    try:
        compress(zero, model, LOSSY)
    except TypeError as error:
        found["whole"] = str(error)
    compress(zero.optim, model, LOSSY, allow_empty=True)  # one rank has the table
    before = snapshot(model, zero.optim)
    give_gradients(model, 0)
    try:
        zero.step()
    except TypeError as error:
        found["inner"] = str(error)
    return found | {"before": before, "after": snapshot(model, zero.optim)}


@pytest.mark.distributed
def test_it_is_refused_before_anything_changes():
    ranks = run_ranks(refusals, WORLD)
    assert sorted(rank["owned"] for rank in ranks) == [1, 2], "every rank has other layers"
    for rank in ranks:
        for refused in ("whole", "inner"):
            assert rank[refused].startswith("ZeroRedundancyOptimizer cannot be compressed, nor the optimizer inside")
            assert "use FSDP2 (fully_shard) or DeepSpeed's ZeRO-1" in rank[refused]
        assert_same(rank["after"], rank["before"])
