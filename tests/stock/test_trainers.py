"""Optimizers without a rule under Lightning, Accelerate and DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sketch import BFloat16, Policy, Rule, attach, compress, report
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from lightning_sketch.rules.inside import unwrap
from tests.deepspeed_tools import engine, init_deepspeed
from tests.integrations.lightning_tools import trainer
from tests.ranks import run_ranks
from tests.stock.optimizers import BF16, NADAM, Matrices
from tests.stock.test_several import POLICY, Net
from tests.tiny import assert_same, snapshot


class Both(LightningModule):
    """Muon and AdamW, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = Net()

    def configure_optimizers(self) -> Any:
        others = [self.net.table.weight, self.net.hidden.bias]
        return [torch.optim.Muon([self.net.hidden.weight], lr=0.02), torch.optim.AdamW(others, lr=0.01)]

    def training_step(self, ids: Tensor, index: int) -> None:
        loss = nn.functional.cross_entropy(self.net(ids), (ids + 1) % 40)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def fit(steps: int, ckpt_path: Any = None) -> Any:
    callbacks = [OptimizerStateCompression(POLICY)]
    made = trainer(max_epochs=9, max_steps=2 * steps, callbacks=callbacks)  # a step of each optimizer counts
    made.fit(Both(), DataLoader([torch.arange(8)] * 3, batch_size=None), ckpt_path=ckpt_path)
    return made


def test_muon_beside_adamw_under_lightning_resumes_bit_for_bit(tmp_path):
    whole = fit(6)
    half = fit(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(6, tmp_path / "half.ckpt")
    assert [type(o).__name__ for o in whole.optimizers] == ["Muon", "AdamW"]
    for a, b in zip(whole.optimizers, resumed.optimizers, strict=True):
        assert_same(snapshot(resumed.lightning_module, b), snapshot(whole.lightning_module, a))
    muon = whole.optimizers[0]
    assert report(muon).state_by_codec["BFloat16"] == 2 * 8 * 8


def test_accelerate_prepares_and_saves_them(tmp_path):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = Matrices()
    optimizer = compress(NADAM.make(model.parameters()), model, BF16)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(model(torch.arange(8)).square().mean())
        optimizer.step()

    step()
    accelerator.save_state(str(tmp_path / "state"))
    step()
    after = snapshot(model, unwrap(optimizer))
    accelerator.load_state(str(tmp_path / "state"))
    step()
    assert_same(snapshot(model, unwrap(optimizer)), after)
    assert unwrap(optimizer).state[model.table.weight]["exp_avg"].dtype == torch.bfloat16


def flat(rank: int, world_size: int) -> list[str]:
    init_deepspeed(rank, world_size)
    model = Matrices()
    optimizer = compress(NADAM.make(model.parameters()), model, Policy([Rule(first_moment=BFloat16())]))
    made = engine(model, optimizer, 1)
    errors = []
    with pytest.raises(RuntimeError) as refused:
        attach(made)
    errors.append(str(refused.value))
    made.backward(made(torch.arange(8)).square().mean())
    with pytest.raises(RuntimeError) as refused:
        made.step()
    return [*errors, str(refused.value)]


@pytest.mark.distributed
def test_deepspeed_s_flat_tensors_are_refused():
    for errors in run_ranks(flat, 2):
        for error in errors:
            assert error.startswith("DeepSpeed joined the parameters into flat tensors, in which only optimizers with")
            assert "there is none for NAdam: train with Adam" in error
