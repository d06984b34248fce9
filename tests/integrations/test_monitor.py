"""A monitor's figures reach the loggers of Lightning, the trackers of Accelerate, and the Trainer's log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim import AdamW
from transformers import TrainerCallback

from lightning_sketch import CountSketch, Monitor, Policy, Rule, compress
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from lightning_sketch.integrations.transformers import compressed_optimizer
from lightning_sketch.integrations.transformers_monitor import MonitorCallback
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.monitor import StateDrift, Threshold
from tests.integrations.lightning_tools import PACKAGES, adamw, batches, tiny, trainer, weights
from tests.integrations.test_transformers import POLICY as OF_LLAMA
from tests.integrations.test_transformers import arguments, data, llama

SKETCH = Policy([Rule(role="embedding", exp_avg=CountSketch(compression=8), exp_avg_sq=CountSketch(compression=8))])
ALWAYS = Threshold(1e-9, 1e-9)
COSINE = "optimizer_state/table.weight/update_cosine"


class Logger(DummyLogger):
    """Remembers what it was given, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.logged.setdefault(step, {}).update(metrics)


def fit(monitor: Monitor, *, package: str = PACKAGES[0], ckpt_path: Any = None, steps: int = 6, **options: Any) -> Any:
    module = tiny(adamw, package)
    callback = OptimizerStateCompression(SKETCH, log_memory=False, monitor=monitor)
    made = trainer(package, callbacks=[callback], max_steps=steps, max_epochs=-1, **options)
    made.fit(module, batches(6), ckpt_path=ckpt_path)
    return made


def codecs_of(optimizer: Any) -> Any:
    record = optimizer.param_groups[0]["compression"][0]
    return LayerRecord.from_record(record).codecs


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_s_loggers_get_the_figures_in_the_steps_in_which_they_were_made(package):
    logger = Logger()
    fit(Monitor(every=2), package=package, logger=logger, log_every_n_steps=100)
    assert sorted(step for step, metrics in logger.logged.items() if COSINE in metrics) == [2, 4, 6]
    assert {"optimizer_state/table.weight/exp_avg_sq_error", COSINE} <= logger.logged[4].keys()


def test_drift_ends_a_lightning_run_after_the_step():
    with pytest.raises(StateDrift, match=r"table\.weight: .*at most 1e-09"):
        fit(Monitor(every=2, on_drift="raise", threshold=ALWAYS))


def test_a_lightning_run_that_was_widened_resumes_under_its_own_policy(tmp_path):
    made = fit(Monitor(every=2, on_drift="widen", threshold=ALWAYS), steps=3)
    widened = codecs_of(made.optimizers[0])
    assert widened["exp_avg"].compression < 5
    made.save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit(Monitor(every=100), steps=3, ckpt_path=tmp_path / "last.ckpt")
    assert codecs_of(resumed.optimizers[0]) == widened
    on = fit(Monitor(every=100), steps=5, ckpt_path=tmp_path / "last.ckpt")
    assert codecs_of(on.optimizers[0]) == widened
    assert not torch.equal(weights(on.lightning_module)["table.weight"], weights(made.lightning_module)["table.weight"])


@pytest.fixture
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Tracker(GeneralTracker):
    """Remembers what it was given, by step."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    @property
    def tracker(self) -> Any:
        return self.logged

    def log(self, values: Any, step: Any = None, **kwargs: Any) -> None:
        self.logged.setdefault(step, {}).update(values)


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after it"])
def test_accelerate_s_trackers_get_the_figures(before):
    tracker, monitor = Tracker(), Monitor(every=2)
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    accelerator.init_trackers("run")
    module = tiny(adamw)
    optimizer: Any = AdamW(module.parameters())
    if before:
        compress(optimizer, module, SKETCH, monitor=monitor)
    module, optimizer = accelerator.prepare(module, optimizer)
    if not before:
        compress(optimizer, module, SKETCH, monitor=monitor)
    for step, (tokens, target) in enumerate(batches(6), start=1):
        loss = torch.nn.functional.cross_entropy(module.head(module.table(tokens).mean(1)), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % monitor.every == 0:
            accelerator.log(monitor.figures(), step=step)
    assert sorted(tracker.logged) == [2, 4, 6]
    assert all(COSINE in metrics for metrics in tracker.logged.values())


class Reporter(TrainerCallback):
    """What stands for TensorBoard: the Trainer calls it before callbacks of the user's."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


def test_the_trainer_s_log_gets_the_figures_and_reporters_too_if_asked():
    from transformers import Trainer

    key = "optimizer_state/model.embed_tokens.weight/update_cosine"
    for reach in (False, True):
        args, monitor, reporter = arguments(max_steps=6, logging_steps=4), Monitor(every=2), Reporter()
        callback = MonitorCallback(monitor)
        made = Trainer(
            llama(),
            args,
            train_dataset=data(),
            optimizer_cls_and_kwargs=compressed_optimizer(args, OF_LLAMA, monitor=monitor),
            callbacks=[reporter, callback],
        )
        if reach:
            callback.reach(made)
        made.train()
        assert [entry["step"] for entry in made.state.log_history if key in entry] == [2, 4, 6]
        assert sum(key in logs for logs in reporter.logged) == (3 if reach else 0)
