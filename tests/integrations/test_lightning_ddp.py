"""Data-parallel replicas under Lightning stay bit-identical: nothing but gradients is ever communicated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_sketch import CountSketch, Policy, Rule
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from tests.gloo import one_thread
from tests.integrations.lightning_tools import POLICY, adamw, batches, tiny, trainer
from tests.ranks import preload, run_ranks

STEPS = 30
SKETCH = Policy([Rule(role="embedding", exp_avg=CountSketch(compression=2), exp_avg_sq=CountSketch(compression=4))])


class OneThread(DDPStrategy):
    """See `tests.gloo.one_thread`, for ranks that Lightning starts."""

    def setup_environment(self):
        one_thread()
        # What is sent to another process shares its memory. Lightning copies the weights where it spawns ranks, and not
        # where a server forks them, which would all step the same weights.
        for param in self.lightning_module.parameters():
            param.data = param.data.clone()
        super().setup_environment()


class Snapshot(Callback):
    """Write this rank's weights, states and losses to a file. The other ranks' memory is gone after a fit."""

    def on_train_end(self, trainer, pl_module):
        states = trainer.optimizers[0].state
        snapshot = {
            "weights": pl_module.state_dict(),
            "states": [states[p] for p in pl_module.parameters()],
            "losses": pl_module.losses,
        }
        torch.save(snapshot, f"rank{trainer.global_rank}.pt")


def fit(world_size, policy, *, sparse, **strategy):
    module = tiny(adamw, sparse=sparse)
    made = trainer(
        devices=world_size,
        strategy=OneThread(process_group_backend="gloo", **strategy),
        callbacks=[OptimizerStateCompression(policy, log_memory=False), Snapshot()],
        max_steps=STEPS,
        max_epochs=-1,
    )
    made.fit(module, batches(60))


def assert_replicas_agree(world_size):
    ranks = [torch.load(f"rank{rank}.pt") for rank in range(world_size)]
    first = ranks[0]
    assert len(first["losses"]) == STEPS
    assert "exp_avg_sq" not in first["states"][0], "compressed"
    for other in ranks[1:]:
        assert other["losses"] != first["losses"], "every rank has its own batches"
        torch.testing.assert_close(other["weights"], first["weights"], rtol=0, atol=0)
        torch.testing.assert_close(other["states"], first["states"], rtol=0, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_two_ranks_that_lightning_starts(sparse):
    preload()
    fit(2, SKETCH if sparse else POLICY, sparse=sparse, start_method="forkserver")
    assert_replicas_agree(2)


def _dense_then_sparse(rank, world_size):
    # The variables that torchrun sets: Lightning then starts no processes of its own.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world_size)}
    for folder, policy in (("dense", POLICY), ("sparse", SKETCH)):
        Path(folder).mkdir(exist_ok=True)
        os.chdir(folder)
        fit(world_size, policy, sparse=folder == "sparse")
        os.chdir("..")


@pytest.mark.distributed
def test_three_ranks(monkeypatch):
    run_ranks(_dense_then_sparse, 3)
    for folder in ("dense", "sparse"):
        monkeypatch.chdir(folder)
        assert_replicas_agree(3)
        monkeypatch.chdir("..")
