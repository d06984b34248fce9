"""The callback beside what a Trainer does with optimizers: precision, accumulation, other callbacks, loggers."""

from __future__ import annotations

import copy
import csv
import logging
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning_utilities.core import rank_zero
from torch.optim import SGD, AdamW, lr_scheduler

from lightning_sketch import compress, report
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


def user_compressed(module):
    return compress(adamw(module), module, POLICY)


def assert_as_if_the_user_had_called_compress(make_options=dict, **module_options):
    """Train with the callback and without it over a converted optimizer; return the callback's module and trainer."""
    module, expected = tiny(adamw, **module_options), tiny(user_compressed, **module_options)
    made = fit(module, **make_options())
    fit(expected, compressed=False, **make_options())
    assert_table_compressed(made)
    assert_same_weights(module, expected)
    return module, made


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision, package):
    module, made = assert_as_if_the_user_had_called_compress(lambda: {"precision": precision}, package=package)
    row = made.optimizers[0].state[module.table.weight]["exp_avg_sq_row"]
    assert row.dtype == (torch.float64 if precision == "64-true" else torch.float32)


def _fp16(scale):
    # "16-mixed" on a CPU falls back to bfloat16, so the plugin is built by hand.
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_the_loss_scale_is_taken_out_of_compressed_and_kept_gradients(fused):
    trained = []
    for scale in (1.0, 1024.0):
        module = tiny(lambda m: SGD(m.parameters(), lr=1.0, momentum=0.9, fused=fused))
        made = fit(module, plugins=[_fp16(scale)])
        assert "compression" in made.optimizers[0].param_groups[0]
        trained.append(module)
    for ours, unscaled in zip(trained[1].parameters(), trained[0].parameters(), strict=True):
        torch.testing.assert_close(ours, unscaled, rtol=0.05, atol=0.02)  # rounding of fp16 and of bf16 momentum


def test_an_overflow_under_the_loss_scale_skips_the_step():
    module, untrained = tiny(adamw), tiny(adamw)
    plugin = _fp16(2.0**24)
    fit(module, batches(1), plugins=[plugin])
    assert plugin.scaler.get_scale() == 2.0**23
    assert_same_weights(module, untrained)


@pytest.mark.parametrize("package", PACKAGES)
def test_accumulation_and_clipping(package):
    module, made = assert_as_if_the_user_had_called_compress(
        lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, package=package
    )
    assert made.optimizers[0].state[module.table.weight]["step"] == 3


def test_accumulated_sparse_gradients():
    assert_as_if_the_user_had_called_compress(lambda: {"accumulate_grad_batches": 3}, sparse=True)


class _EMA(WeightAveraging):
    def __init__(self):
        super().__init__(avg_fn=lambda average, current, _: average.lerp(current, 0.5))


@pytest.mark.parametrize("ours_first", [False, True], ids=["EMA first", "ours first"])
def test_weight_averaging(ours_first):
    expected, module = tiny(user_compressed), tiny(adamw)
    fit(expected, callbacks=[_EMA()], compressed=False)
    both = [OptimizerStateCompression(POLICY), _EMA()]
    made = fit(module, callbacks=both if ours_first else both[::-1], compressed=False)
    assert_table_compressed(made)
    assert_same_weights(module, expected)


class _CopyInSetup(Callback):
    def setup(self, trainer, pl_module, stage):
        self.copied = copy.deepcopy(pl_module)


def test_a_copy_of_the_module_made_in_setup_is_not_patched_either():
    copier = _CopyInSetup()
    fit(tiny(adamw), callbacks=[OptimizerStateCompression(POLICY), copier], compressed=False)
    optimizer = copier.copied.configure_optimizers()
    assert type(optimizer) is AdamW
    assert optimizer.param_groups[0]["params"][0] is copier.copied.table.weight
    assert pickle.dumps(copier.copied)


def test_stochastic_weight_averaging():
    swa = {"swa_lrs": 0.05, "swa_epoch_start": 1, "annealing_epochs": 1}
    module, _ = assert_as_if_the_user_had_called_compress(
        lambda: {"callbacks": [StochasticWeightAveraging(**swa)], "max_epochs": 4}
    )
    assert module.lrs[-1] == [0.05]


def _with_lr_attribute(module):
    return AdamW(module.parameters(), lr=module.lr)


def test_the_learning_rate_finder_suggests_what_it_suggests_without_the_callback():
    suggested = []
    for compressed in (True, False):
        make = _with_lr_attribute if compressed else (lambda m: compress(_with_lr_attribute(m), m, POLICY))
        module = tiny(make)
        module.lr = 1e-3
        finder = LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=20)
        made = fit(module, batches(20), callbacks=[finder], compressed=compressed)
        assert_table_compressed(made)
        suggested.append(finder.optimal_lr.suggestion())
    assert suggested[0] == suggested[1] == made.optimizers[0].param_groups[0]["lr"]


def test_a_tuner_before_fit_leaves_the_module_unpatched():
    module = tiny(_with_lr_attribute)
    module.lr = 1e-3
    made = trainer(callbacks=[OptimizerStateCompression(POLICY)])
    Tuner(made).lr_find(module, batches(20), num_training=10)
    assert "configure_optimizers" not in vars(module)
    made.fit(module, batches())
    assert_table_compressed(made)


def test_the_learning_rate_monitor_records_the_schedule():
    def configure(m):
        optimizer = adamw(m)
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    monitor = LearningRateMonitor(logging_interval="step")
    fit(tiny(configure), callbacks=[monitor], logger=CSVLogger("."), log_every_n_steps=1)
    assert monitor.lrs["lr"] == pytest.approx([1e-2 * 0.5**i for i in range(6)])


class _UnfreezeTable(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.table)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.table, optimizer, initial_denom_lr=1.0)


def test_the_policy_decides_a_parameter_group_that_is_added_while_training():
    module = tiny(lambda m: AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2))
    made = fit(module, callbacks=[_UnfreezeTable()], max_epochs=2)
    assert len(made.optimizers[0].param_groups) == 2
    assert_table_compressed(made)


@pytest.mark.parametrize("package", PACKAGES)
def test_loggers_get_the_bytes_once(package):
    module = tiny(adamw, package)
    made = fit(
        module,
        callbacks=[OptimizerStateCompression(POLICY)],
        compressed=False,
        logger=CSVLogger("logs", name="", version=""),
        log_every_n_steps=1,
        max_epochs=2,
    )
    made.logger.save()
    rows = list(csv.DictReader(Path("logs/metrics.csv").read_text().splitlines()))
    figures = [row for row in rows if row["optimizer_state/bytes"]]
    measured = report(made.optimizers[0])
    assert len(figures) == 1
    assert int(figures[0]["optimizer_state/bytes"]) == measured.state
    assert int(figures[0]["optimizer_state/dense_bytes"]) == measured.dense_state
    assert int(figures[0]["optimizer_state/bytes_RowWise"]) == measured.state_by_codec["RowWise"]
    assert int(figures[0]["step"]) == 1


@pytest.mark.parametrize("log_memory", [False, True])
def test_the_plan_and_one_line_of_bytes_are_printed_where_lightning_prints(log_memory):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    rank_zero.log.addHandler(handler)
    try:
        callback = OptimizerStateCompression(POLICY, log_memory=log_memory)
        made = fit(tiny(adamw), callbacks=[callback], compressed=False)
    finally:
        rank_zero.log.removeHandler(handler)
    plans = [i for i, message in enumerate(messages) if "exp_avg_sq: RowWise()" in message]
    lines = [i for i, message in enumerate(messages) if message.startswith("optimizer state: ")]
    assert len(plans) == len(lines) == log_memory
    assert not log_memory or plans < lines
    measured = f"{report(made.optimizers[0]).state / 1024:.2f} KiB"
    assert all(measured in messages[line] for line in lines)


def test_a_gradient_that_is_not_finite_stops_the_fit_or_its_rows_are_left_out():
    class Poison(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pl_module.table.weight.grad[0, 0] = torch.nan

    with pytest.raises(FloatingPointError, match=r"NaN or inf in the gradient of table\.weight"):
        fit(tiny(adamw), callbacks=[Poison()])
    module = tiny(adamw)
    skipping = OptimizerStateCompression(POLICY, nonfinite="skip")
    with pytest.warns(UserWarning, match="1 row left out of the step"):
        made = fit(module, callbacks=[Poison(), skipping], compressed=False)
    assert report(made.optimizers[0]).skipped == {"table.weight": 6}
    before = tiny(adamw).table.weight
    assert torch.equal(module.table.weight[0], before[0])
    assert not torch.equal(module.table.weight[1:], before[1:])
