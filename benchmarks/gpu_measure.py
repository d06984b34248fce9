"""Time and temporary memory of steps on a GPU, and our contestants under each kind of kernels."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.speed_measure import Contestant
from lightning_sketch.kernels import native


def event_time(run: Callable[[], object]) -> float:
    """Seconds between two events on the device around a call.

    The device is idle beforehand, so what the processor takes to launch kernels counts where they are shorter.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()  # type: ignore[no-untyped-call]
    run()
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)  # type: ignore[no-untyped-call]
    return milliseconds / 1e3


def allocated(optimizer: Optimizer, gradients: tuple[Tensor, ...]) -> int:
    """The most bytes that torch allocated on the device beyond what was there before a step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()  # an optimizer may coalesce its gradients in place
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    optimizer.zero_grad()
    return most


def kernels_on(device: torch.device) -> dict[str, str]:
    """What can do our steps on a device: values of the environment variable that chooses, and words."""
    if device.type == "cpu":
        return {"": native.describe()}
    triton = {"": "Triton"} if importlib.util.find_spec("triton") else {}
    return {"reference": "plain PyTorch"} | triton


def by_each(entries: Sequence[Contestant], kernels: Mapping[str, str]) -> list[Contestant]:
    """The contestants, ours once for each of `kernels`. Those step the same parameters and states in turn."""
    own = {entry.name for entry in entries if entry.nonfinite is not None}
    found: list[Contestant] = []
    for entry in entries:
        if entry.name not in own:
            found.append(entry)
            continue
        for value, words in kernels.items():
            optimizer: Any = Under(entry.optimizer, value)
            against = _renamed(entry.against, words) if entry.against in own else entry.against
            label = f"{entry.label}, {words}"
            key = f"{entry.key} ({words})"
            # Kernels that fail are a result: the others are measured all the same.
            found.append(
                replace(entry, key=key, label=label, optimizer=optimizer, against=against, may_fail=bool(value))
            )
    return found


def _renamed(name: str, words: str) -> str:
    """`Contestant.name` after `by_each`."""
    key, nonfinite = name.split("/")
    return f"{key} ({words})/{nonfinite}"


class Under:
    """An optimizer whose steps are done by the kernels that `native.VARIABLE` names."""

    def __init__(self, optimizer: Optimizer, kernels: str) -> None:
        self.optimizer, self.kernels = optimizer, kernels

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[Tensor, Any]:
        return self.optimizer.state

    def step(self) -> None:
        with under(self.kernels):
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


@contextmanager
def under(kernels: str) -> Iterator[None]:
    """Steps are done by the kernels that `native.VARIABLE` would name."""
    before = os.environ.get(native.VARIABLE)
    os.environ[native.VARIABLE] = kernels
    try:
        yield
    finally:
        if before is None:
            del os.environ[native.VARIABLE]
        else:
            os.environ[native.VARIABLE] = before
