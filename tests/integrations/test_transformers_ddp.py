"""The Hugging Face Trainer under torchrun, on real gloo processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gloo import launch

STEPS = 200
SCRIPT = Path(__file__).with_name("trainer_script.py")


@pytest.fixture(
    scope="module",
    params=[(2, "dense"), (3, "dense"), (2, "sparse"), (3, "sparse")],
    ids=lambda param: f"{param[0]} {param[1]}",
)
def replicas(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank of one run ended with."""
    world_size, gradients = request.param
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    launch([*torchrun, str(SCRIPT), str(STEPS), gradients], folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


@pytest.mark.distributed
def test_replicas_stay_bit_identical(replicas):
    first, *others = replicas
    assert first["processes"] == len(replicas)
    assert {float(state["step"]) for state in first["end"]["states"].values()} == {STEPS}
    for other in others:
        assert other["seen"] != first["seen"]
        torch.testing.assert_close(other["end"], first["end"], rtol=0, atol=0)


@pytest.mark.distributed
def test_replicas_resume_bit_exactly(replicas):
    for replica in replicas:
        torch.testing.assert_close(replica["resumed"], replica["end"], rtol=0, atol=0)


@pytest.mark.distributed
def test_replicas_learn(replicas):
    losses = replicas[0]["losses"]
    assert losses[-1] < 0.5 * losses[0]
