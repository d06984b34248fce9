"""What the documentation says about trainers and models of another form (DPOTrainer, nn.ModuleList, Muon, pruning)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import Trainer

from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress, plan, report
from lightning_sketch.optimizer.classes import CompressedAdamW
from lightning_sketch.rules.inside import unwrap
from tests.integrations.test_transformers import TIED, arguments, assert_same, data, gpt2, log

POLICY = Policy([Rule(role="embedding", first_moment=BFloat16(), second_moment=RowWise())])


class CompressedTrainer(Trainer):
    """What docs/trainers.md shows, for trainers without ``optimizer_cls_and_kwargs``."""

    def create_optimizer(self, model: Any = None) -> Any:
        return compress(super().create_optimizer(model), self.model if model is None else model, TIED)


def trainer_of(form: str, args: Any) -> Trainer:
    model = gpt2()
    if form == "create_optimizer":
        return CompressedTrainer(model, args, train_dataset=data())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    return Trainer(model, args, train_dataset=data(), optimizers=(compress(optimizer, model, TIED), scheduler))


@pytest.mark.parametrize("form", ["optimizers", "create_optimizer"])
def test_trainers_without_optimizer_cls_and_kwargs_train_and_resume(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments(save_strategy="steps", save_steps=5, optim="adamw_torch")
    undisturbed, resumed = (trainer_of(form, args) for _ in range(2))
    undisturbed.train()
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    assert type(unwrap(resumed.optimizer)) is CompressedAdamW
    assert {"BFloat16", "CountSketch", "SM3"} <= set(report(resumed.optimizer).state_by_codec)
    assert len(set(log(resumed, "learning_rate"))) == 8
    assert_same(resumed.model.state_dict(), undisturbed.model.state_dict())
    assert_same(resumed.optimizer.state_dict()["state"], undisturbed.optimizer.state_dict()["state"])


@pytest.mark.parametrize("both", [nn.ModuleList, lambda parts: nn.ModuleDict({"0": parts[0], "1": parts[1]})])
def test_several_modules_with_one_optimizer(both):
    encoder, decoder = nn.Sequential(nn.Embedding(40, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 40))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()])
    policy = Policy([Rule(role="embedding", exp_avg=BFloat16()), Rule(name="1.0.weight", exp_avg_sq=RowWise())])
    compress(optimizer, both([encoder, decoder]), policy)  # the container may go: its parts stay
    nn.functional.cross_entropy(decoder(encoder(torch.arange(8))), torch.arange(8)).backward()
    optimizer.step()
    assert [layer.fqn for _, layer, _ in optimizer.compressed_layers()] == ["0.0.weight", "1.0.weight"]


def test_muon_beside_a_compressed_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 40))
    matrices = [model[1].weight]
    others = [param for param in model.parameters() if all(param is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02)
    adamw = compress(torch.optim.AdamW(others, lr=0.01), model, POLICY)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(torch.arange(8)), torch.arange(8))
        for optimizer in (muon, adamw):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert [layer.fqn for _, layer, _ in adamw.compressed_layers()] == ["0.weight"]
    assert plan(model, muon, POLICY).bytes_before == plan(model, muon, POLICY).bytes_after == 8 * 8 * 4


def pruned(nonfinite: Any) -> tuple[nn.Module, Tensor]:
    """A table of which one row is pruned, and whose gradient is NaN there."""
    torch.manual_seed(0)
    table = nn.Embedding(6, 2)
    prune.custom_from_mask(table, "weight", torch.ones(6, 2).index_fill(0, torch.tensor([2]), 0.0))
    policy = Policy([Rule(name="weight_orig", first_moment=BFloat16(), second_moment=RowWise())])
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    if nonfinite is not None:
        compress(optimizer, table, policy, nonfinite=nonfinite)
    for _ in range(2):
        optimizer.zero_grad()
        table(torch.arange(6)).square().sum().backward()
        table.weight_orig.grad[2] = float("nan")
        optimizer.step()
    return table, table.weight_orig.detach()


def test_nan_gradients_that_torch_passes_over_need_propagate():
    with pytest.raises(FloatingPointError, match=r'weight_orig.*"propagate"'):
        pruned("raise")
    stock, ours = pruned(None)[1], pruned("propagate")[1]
    assert ours.isnan().equal(stock.isnan())  # the pruned row alone
    assert ours.isnan().sum() == 2
    torch.testing.assert_close(ours, stock, rtol=0, atol=0.25, equal_nan=True)
