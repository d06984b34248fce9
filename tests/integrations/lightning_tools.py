"""A tiny module and trainer for the Lightning tests, for both Lightning packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sketch import BFloat16, Policy, RowWise, Rule
from lightning_sketch.integrations.lightning import OptimizerStateCompression

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
POLICY = Policy([Rule(name="table.weight", first_moment=BFloat16(), second_moment=RowWise())])
ROWS, DIM = 40, 8


class _Tiny:
    """A table and a dense head. `configure` is what the user would write in ``configure_optimizers``."""

    def __init__(self, configure: Callable[[Any], Any], *, sparse: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.configure = configure
        self.automatic_optimization = not manual
        self.table = nn.Embedding(ROWS, DIM, sparse=sparse)
        self.head = nn.Linear(DIM, 5)
        self.losses: list[float] = []
        self.lrs: list[list[float]] = []  # of every optimizer, by step

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        tokens, target = batch
        features = self.table(tokens).mean(1).to(self.head.weight.dtype)
        loss = nn.functional.cross_entropy(self.head(features), target)
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            listed = optimizers if isinstance(optimizers, list) else [optimizers]
            for optimizer in listed:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in listed:
                optimizer.step()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("validation", self.table(batch[0]).sum())

    test_step = validation_step

    def on_train_batch_end(self, *_: Any) -> None:
        self.lrs.append([float(group["lr"]) for o in self.trainer.optimizers for group in o.param_groups])

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Tiny(_Tiny, lightning.pytorch.LightningModule):
    """The module of ``lightning``."""


class TinyStandalone(_Tiny, pytorch_lightning.LightningModule):
    """The module of ``pytorch_lightning``."""


def tiny(configure: Callable[[Any], Any], package: str = PACKAGES[0], **options: Any) -> Any:
    """A module of `package` with the same initial weights every time."""
    torch.manual_seed(0)
    return (Tiny if package == PACKAGES[0] else TinyStandalone)(configure, **options)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def batches(count: int = 6, *, identical: bool = False) -> Any:
    """Token ids ``[4, 3]`` and targets ``[4]``; the same ones every time.

    Args:
        identical: one batch, repeated: resuming in the middle of an epoch starts the loader again.
    """
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randint(ROWS, (4, 3), generator=generator), torch.randint(5, (4,), generator=generator))
        for _ in range(1 if identical else count)
    ]
    return DataLoader(made * (count if identical else 1), batch_size=None)  # type: ignore[arg-type]


def trainer(package: str = PACKAGES[0], **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": 1}
    return importlib.import_module(package).Trainer(**quiet | defaults | options)


def fit(module: Any, data: Any = None, *, compressed: bool = True, ckpt_path: Any = None, **options: Any) -> Any:
    """Train `module`, with ``OptimizerStateCompression(POLICY)`` unless `compressed` is False; return the trainer."""
    package = PACKAGES[0] if isinstance(module, lightning.pytorch.LightningModule) else PACKAGES[1]
    callbacks = list(options.pop("callbacks", []))
    if compressed:
        callbacks.append(OptimizerStateCompression(POLICY, log_memory=False))
    made = trainer(package, callbacks=callbacks, **options)
    made.fit(module, batches() if data is None else data, ckpt_path=ckpt_path)
    return made


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, copied."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same_weights(module: nn.Module, expected: nn.Module | dict[str, Tensor]) -> None:
    """Bit for bit."""
    other = expected if isinstance(expected, dict) else weights(expected)
    for name, value in weights(module).items():
        assert torch.equal(value, other[name]), name


def assert_table_compressed(made: Any) -> None:
    """The table's states, and no others, are in their codecs, in the optimizer that the trainer steps."""
    states = {
        name: set(optimizer.state[p])
        for optimizer in made.optimizers
        for name, p in made.lightning_module.named_parameters()
        if p in optimizer.state
    }
    assert {"exp_avg", "exp_avg_sq_row"} <= states["table.weight"]
    assert all("exp_avg_sq" in keys for name, keys in states.items() if name != "table.weight")
