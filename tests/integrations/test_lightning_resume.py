"""Checkpoints of Lightning: saved anywhere in a run, resumed with the callback, without it, or under another policy."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch.optim import SGD, AdamW, lr_scheduler

from lightning_sketch import SM3, CountSketch, Drop, Policy, RowWise, Rule, decompress_state_dict, report
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from tests.integrations.lightning_tools import (
    PACKAGES,
    POLICY,
    adamw,
    assert_same_weights,
    assert_table_compressed,
    batches,
    fit,
    tiny,
    trainer,
)

HALF, WHOLE = 5, 10
SKETCH = Policy([Rule(role="embedding", exp_avg=CountSketch(compression=2), exp_avg_sq=CountSketch(compression=4))])


def scheduled(module):
    optimizer = adamw(module)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, WHOLE)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(module, policy=POLICY, *, steps=WHOLE, callbacks=(), **options):
    """Train on one repeated batch, because resuming within an epoch starts the loader again."""
    mine = [OptimizerStateCompression(policy, log_memory=False)] if policy else []
    options = {"callbacks": [*mine, *callbacks], "compressed": False, "max_steps": steps, "max_epochs": -1} | options
    return fit(module, batches(7, identical=True), **options)


def saved_half_way(configure, policy=POLICY, package=PACKAGES[0], *, steps=HALF, module=None, **options):
    """A checkpoint of the first half of a run; 5 steps of an epoch of 7."""
    made = run(tiny(configure, package, **(module or {})), policy, steps=steps, **options)
    made.save_checkpoint("half.ckpt")
    return "half.ckpt"


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("policy", [POLICY, SKETCH], ids=["rows", "sketch"])
def test_resuming_in_the_middle_is_bit_exact(policy, precision, package):
    path = saved_half_way(scheduled, policy, package, precision=precision)
    resumed, whole = tiny(scheduled, package), tiny(scheduled, package)
    run(resumed, policy, ckpt_path=path, precision=precision)
    run(whole, policy, precision=precision)
    assert_same_weights(resumed, whole)
    assert resumed.losses == whole.losses[HALF:]
    assert resumed.lrs == whole.lrs[HALF:]


def test_resuming_sparse_gradients_is_bit_exact():
    path = saved_half_way(scheduled, SKETCH, module={"sparse": True})
    resumed, whole = tiny(scheduled, sparse=True), tiny(scheduled, sparse=True)
    run(resumed, SKETCH, ckpt_path=path)
    run(whole, SKETCH)
    assert_same_weights(resumed, whole)


def test_resuming_two_optimizers_is_bit_exact():
    def configure(m):
        return [AdamW(m.head.parameters(), lr=1e-2), SGD(m.table.parameters(), lr=0.1, momentum=0.9)]

    path = saved_half_way(
        configure, module={"manual": True}, steps=2 * HALF
    )  # Lightning counts every optimizer's steps
    resumed, whole = tiny(configure, manual=True), tiny(configure, manual=True)
    run(resumed, ckpt_path=path, steps=2 * WHOLE)
    run(whole, steps=2 * WHOLE)
    assert len(whole.losses) == WHOLE
    assert_same_weights(resumed, whole)


def test_every_checkpoint_of_model_checkpoint_resumes():
    whole = tiny(scheduled)
    options = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}", "dirpath": "saved"}
    run(whole, callbacks=[ModelCheckpoint(**options)], enable_checkpointing=True)
    for step in (3, 6, 9):
        resumed = tiny(scheduled)
        run(resumed, ckpt_path=f"saved/step={step}.ckpt")
        assert len(resumed.losses) == WHOLE - step
        assert_same_weights(resumed, whole)


def test_a_checkpoint_loads_as_weights_only():
    path = saved_half_way(scheduled)
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    assert json.loads(state["param_groups"][0]["compression"][0])["fqn"] == "table.weight"


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_uncompressed_checkpoint_resumes_compressed(precision, package):
    path = saved_half_way(scheduled, None, package, precision=precision)
    module = tiny(scheduled, package)
    made = run(module, ckpt_path=path, precision=precision)
    assert_table_compressed(made)
    assert made.optimizers[0].state[module.table.weight]["step"] == WHOLE
    errors = report(made.optimizers[0]).conversion_errors["table.weight"]
    assert 0 <= errors["exp_avg"] < 0.01 < errors["exp_avg_sq"] < 2


def test_a_checkpoint_made_dense_resumes_without_the_callback():
    path = saved_half_way(scheduled)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_states"] = [decompress_state_dict(state) for state in checkpoint["optimizer_states"]]
    torch.save(checkpoint, "dense.ckpt")
    module = tiny(scheduled)
    made = run(module, None, ckpt_path="dense.ckpt")
    assert type(made.optimizers[0]) is AdamW
    assert made.optimizers[0].state[module.table.weight]["exp_avg_sq"].shape == module.table.weight.shape


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Policy([Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=SM3())]), r"table\.weight: its codecs .*SM3"),
        (Policy(POLICY.rules, seed=1), r"table\.weight: its hash seed"),
        (Policy([Rule(name="head.weight", exp_avg_sq=RowWise())]), r"table\.weight: compressed in the checkpoint"),
    ],
    ids=["codecs", "seed", "layers"],
)
def test_a_checkpoint_of_another_policy_is_refused_before_training(other, reason, package):
    path = saved_half_way(scheduled, package=package)
    module = tiny(scheduled, package)
    with pytest.raises(ValueError, match=rf"does not fit the compressed optimizer(?s:.*){reason}"):
        run(module, other, ckpt_path=path)
    assert module.losses == []


class _UnfreezeTable(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.table)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.table, optimizer, initial_denom_lr=1.0)

    def on_train_start(self, trainer, pl_module):
        if trainer.current_epoch > 1:  # Lightning restores the groups when it resumes, but not requires_grad
            self.make_trainable(pl_module.table)


def trainable(module):
    return AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def finetune(policy, epochs, *, ours_first=True, ckpt_path=None):
    module = tiny(trainable)
    callbacks = [_UnfreezeTable()]
    if policy:
        callbacks.insert(0 if ours_first else 1, OptimizerStateCompression(policy, log_memory=False))
    made = trainer(callbacks=callbacks, max_epochs=epochs)
    made.fit(module, batches(3), ckpt_path=ckpt_path)
    made.save_checkpoint("finetuned.ckpt")
    return module, made


@pytest.mark.parametrize("ours_first", [False, True], ids=["finetuning first", "ours first"])
def test_resuming_after_finetuning_added_a_group_is_bit_exact(ours_first):
    finetune(POLICY, 2, ours_first=ours_first)
    resumed, made = finetune(POLICY, 4, ours_first=ours_first, ckpt_path="finetuned.ckpt")
    whole, _ = finetune(POLICY, 4)
    assert_table_compressed(made)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("ours_first", [False, True], ids=["finetuning first", "ours first"])
def test_an_uncompressed_finetuning_run_resumes_compressed(ours_first):
    finetune(None, 2)
    module, made = finetune(POLICY, 4, ours_first=ours_first, ckpt_path="finetuned.ckpt")
    assert_table_compressed(made)
    assert made.optimizers[0].state[module.table.weight]["step"] == 9


@pytest.mark.parametrize("ours_first", [False, True], ids=["finetuning first", "ours first"])
def test_a_finetuning_run_of_another_policy_is_refused(ours_first):
    finetune(POLICY, 2)
    with pytest.raises(ValueError, match=r"another policy|does not fit"):
        finetune(SKETCH, 4, ours_first=ours_first, ckpt_path="finetuned.ckpt")
