"""One of the demo's two trainings, in a process of its own so that its memory is its own.

``run.py`` starts it twice. The two differ in the line marked "the only difference".
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import corpus
import lightning as L
import torch
from batches import HeldOutTokens, RandomWindows, loader
from model import NextToken
from settings import Settings
from torch import Tensor

# Lines of Lightning that say nothing about this comparison; what the callback prints stays.
NOISE = ("GPU available", "TPU available", "💡", "`Trainer.fit` stopped")


class Recorder(L.Callback):  # type: ignore[misc]
    """The curves, the clock and the bytes; it changes nothing."""

    def __init__(self) -> None:
        self.train: list[float] = []  # loss of each step
        self.validation: list[tuple[int, float]] = []  # (step, loss)
        self.seconds: list[float] = []  # of each step, from batch to batch
        self.gradients = 0  # bytes, the largest seen
        self._started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.train.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        self.gradients = max(self.gradients, sum(map(tensor_bytes, grads)))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        self.validation.append((len(self.train), loss))


def train(settings: Settings, cache: Path, compressed: bool) -> dict[str, Any]:
    """Train once and return what there is to compare."""
    L.seed_everything(settings.seed, verbose=False)
    data = corpus.load(cache)
    model = NextToken(settings, data.counts)
    recorder = Recorder()
    callbacks: list[L.Callback] = [recorder]
    if compressed:  # the only difference
        from lightning_sketch.integrations.lightning import OptimizerStateCompression

        callbacks.append(OptimizerStateCompression())
    before = peak_process_bytes()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=settings.steps,
        val_check_interval=settings.steps // settings.validations,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        model,
        loader(RandomWindows(data.train, settings)),
        loader(HeldOutTokens(data.validation, settings)),
    )
    peak = peak_process_bytes()
    loss = recorder.validation[-1][1]
    return {
        "compressed": compressed,
        "vocabulary": data.vocabulary,
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "bytes": {
            "parameters": sum(map(tensor_bytes, model.parameters())),
            "gradients": recorder.gradients,
            "optimizer_state": sum(
                tensor_bytes(value)
                for optimizer in trainer.optimizers
                for state in optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ),
            "peak_process": peak,
            "before_training": before,
        },
        "optimizer_ms": 1e3 * median(model.optimizer_seconds),
        "tokens_per_second": settings.batch_tokens / median(recorder.seconds),
        "train_loss": recorder.train,
        "validation": recorder.validation,
    }


def tensor_bytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        return tensor_bytes(tensor._indices()) + tensor_bytes(tensor._values())
    return tensor.numel() * tensor.element_size()


def peak_process_bytes() -> int:
    """The largest resident set so far. Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help="JSON of Settings")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--compressed", action="store_true")
    options = parser.parse_args()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda r: not r.getMessage().startswith(NOISE))
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    settings = Settings.from_json(options.settings)
    result = train(settings, options.cache, options.compressed)
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
