"""All layers compressed: a ResNet-18 on Fashion-MNIST, the count-sketch paper's table 5 made small.

ResNet-18 for one channel, at half of its width (32 to 256 channels, 2.8 M parameters), with the first convolution and
the max-pool of the original; two epochs of 55,000 pictures in batches of 128, no augmentation; warm-up over 5 % of the
steps and a linear fall to 2 %. The learning rate of every method is tuned by factors of two on 5,000 pictures with
seed 0. Figures are errors in percent, of 10,000 test pictures: 10 % is known to 0.3 either way (one deviation).

Compressed are the states of all convolutions and of the last layer. Scales and shifts of the normalisations, a fifth
of a percent of the parameters, are kept exactly, as by the released code. A kernel ``[out, in, height, width]`` has its
output channels for rows.

    python -m benchmarks.resnet --methods rmsprop,rmsprop_code5    # results/resnet.json
    python -m benchmarks.resnet --summarise                        # only write it, from finished runs
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer, RMSprop

from benchmarks import fashion_mnist, schedules
from benchmarks.command import run_command
from benchmarks.fashion_mnist import Pictures
from benchmarks.gcide import cache_folder
from benchmarks.sparse_methods import state_bytes
from benchmarks.sweep import Cache, Result, Setting, Sweep

WIDTH = 32  # channels of the first stage; the original has 64
BATCH = 128
EPOCHS = 2
WARM_UP = 0.05  # of the steps
LAST_LR = 0.02  # of the peak
EPS = 1e-8
ALPHA = 0.99  # of RMSprop
BETA2 = 0.999
START_LR = {"rmsprop": 1e-3, "adam": 2e-3}

Codec = Callable[[Any], Any]  # the package -> a codec


class Block(nn.Module):
    """Two convolutions and what goes round them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.round: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.round = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inside + self.round(x))


class ResNet18(nn.Sequential):
    """Pictures ``[batch, 1, height, width]`` -> scores ``[batch, 10]``."""

    def __init__(self, width: int = WIDTH) -> None:
        stages = [Block(width, width, 1), Block(width, width, 1)]
        for channels in (width, 2 * width, 4 * width):
            stages += [Block(channels, 2 * channels, 2), Block(2 * channels, 2 * channels, 1)]
        stem = [nn.Conv2d(1, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        super().__init__(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@dataclass(frozen=True)
class Method:
    """RMSprop or Adam and how the states of all matrices and kernels are stored.

    Args:
        paper: the row of the paper's table 5 that it repeats.
        first, second: codecs of either moment; ``None``: exact.
        preset: a policy of the package, in place of both.
        beta1: whether Adam has its first moment.
    """

    label: str
    family: Literal["rmsprop", "adam"]
    paper: str = ""
    first: Codec | None = None
    second: Codec | None = None
    preset: str = ""
    beta1: bool = True

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        optimizer: Optimizer
        if self.family == "rmsprop":
            optimizer = RMSprop(model.parameters(), lr=lr, alpha=ALPHA, eps=EPS)
        else:
            betas = (0.9 if self.beta1 else 0.0, BETA2)
            optimizer = Adam(model.parameters(), lr=lr, betas=betas, eps=EPS, fused=True)
        if not (self.first or self.second or self.preset):
            return optimizer

        import lightning_sketch as ls

        if self.preset:
            return ls.compress(optimizer, model, ls.Policy.preset(self.preset))
        codecs = {"first_moment": self.first, "second_moment": self.second}
        made = {state: make(ls) for state, make in codecs.items() if make is not None}
        return ls.compress(optimizer, model, ls.Policy([ls.Rule(role="hidden", **made)]))


def _in_row(ls: Any) -> Any:
    from benchmarks.in_row_sketch import InRowSketch

    return InRowSketch(5)


def _paper(ls: Any) -> Any:
    return ls.CountSketch(compression=5, depth=3, update="paper")


def _linear(ls: Any) -> Any:
    return ls.CountSketch(compression=5, depth=3)


def _factored(ls: Any) -> Any:
    return ls.Factored()


def _sm3(ls: Any) -> Any:
    return ls.SM3()


def _drop(ls: Any) -> Any:
    return ls.Drop()


METHODS: dict[str, Method] = {
    "rmsprop": Method("RMSprop, exact", "rmsprop", "RMSprop"),
    "rmsprop_code5": Method("RMSprop, 5x within rows, as the released code", "rmsprop", "CMS-RMSprop", second=_in_row),
    "rmsprop_paper5": Method("RMSprop, 5x of rows, the paper's rule", "rmsprop", second=_paper),
    "rmsprop_linear5": Method("RMSprop, 5x of rows, the package's rule", "rmsprop", second=_linear),
    "adam": Method("Adam, exact", "adam"),
    "adam_whole": Method('Adam, preset "whole-model": Factored, first moment in 8 bits', "adam", preset="whole-model"),
    "adam_8bit": Method('Adam, preset "8bit"', "adam", preset="8bit"),
    "adam_b0": Method("Adam, exact, beta1 = 0", "adam", beta1=False),
    "adam_b0_paper5": Method("Adam, beta1 = 0, 5x of rows, the paper's rule", "adam", first=_drop, second=_paper),
    "adam_b0_linear5": Method("Adam, beta1 = 0, 5x of rows, the package's rule", "adam", first=_drop, second=_linear),
    "adam_linear5_mv": Method("Adam, both moments 5x of rows, the package's rule", "adam", "", _linear, _linear),
    "adam_factored": Method("Adam, Factored, first moment kept", "adam", second=_factored),
    "adam_sm3": Method("Adam, SM3-II (EMA), first moment kept", "adam", second=_sm3),
    "rmsprop_factored": Method("RMSprop, Factored", "rmsprop", second=_factored),
    "rmsprop_sm3": Method("RMSprop, SM3-II (EMA)", "rmsprop", second=_sm3),
    "adam_paper5_mv": Method("Adam, both moments 5x of rows, the paper's rule", "adam", "", _paper, _paper),
}


def run(setting: Setting) -> Result:
    """Train once; errors in percent (None if it diverged), state bytes and seconds."""
    began = time.perf_counter()
    train, valid, test = _pictures()
    torch.manual_seed(setting.seed)
    model = ResNet18()
    optimizer = METHODS[setting.method].optimizer(model, setting.lr)
    finite = _train(model, optimizer, train, setting)
    trained = time.perf_counter()
    return {
        "valid": error_percent(model, valid) if finite else None,
        "test": error_percent(model, test) if finite else None,
        "state_bytes": state_bytes(optimizer),
        "seconds": {"train": trained - began, "all": time.perf_counter() - began},
    }


def _train(model: nn.Module, optimizer: Optimizer, train: Pictures, setting: Setting) -> bool:
    """All epochs; False if the run diverged."""
    model.train()
    random = np.random.default_rng(setting.seed)
    each = len(train.classes) // BATCH  # what is left over is left out
    epochs = [torch.from_numpy(random.permutation(len(train.classes)))[: each * BATCH] for _ in range(EPOCHS)]
    batches = [batch for order in epochs for batch in torch.split(order, BATCH)]
    try:
        for step, picked in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * schedules.linear(step, len(batches), warm_up=WARM_UP, last=LAST_LR)
            pictures = train.pictures[picked].to(memory_format=torch.channels_last)  # faster on CPUs
            loss = F.cross_entropy(model(pictures), train.classes[picked])
            if not loss.isfinite():
                return False
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    except FloatingPointError:  # a gradient that is not finite
        return False
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@torch.no_grad()
def error_percent(model: nn.Module, held_out: Pictures) -> float:
    """Of the pictures, how many are put into a wrong class."""
    model.eval()
    parts = zip(torch.split(held_out.pictures, 500), torch.split(held_out.classes, 500), strict=True)
    wrong = sum(
        int((model(pictures.to(memory_format=torch.channels_last)).argmax(1) != classes).sum())
        for pictures, classes in parts
    )
    return 100 * wrong / len(held_out.classes)


@functools.lru_cache(maxsize=1)
def _pictures() -> tuple[Pictures, Pictures, Pictures]:
    return fashion_mnist.load()


def main() -> None:
    searches = {name: (START_LR[method.family], [EPS]) for name, method in METHODS.items()}
    sweep = Sweep(run, Cache(cache_folder() / "resnet.jsonl"), searches)
    run_command("resnet", __doc__, sweep, {name: method.label for name, method in METHODS.items()}, prepare=_pictures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
