"""What becomes of gradients that are not finite, after a step has left their rows out.

A step counts, for every layer, the rows that it left out (elements, where every state of the layer is element-wise).
Counts on the CPU are judged at once. On an accelerator they are copied without waiting for the device, and judged when
the next step begins, or the one after if the device is not done by then; whoever looks at the states waits for them. Of
several ranks each waits when the next step begins, so that all raise in the same one, and none misses a step.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of Dynamo

from lightning_sketch.kernels.capture import capturing
from lightning_sketch.sharding.agree import several_ranks
from lightning_sketch.sharding.fake import is_fake_tensor

NonFinite = Literal["raise", "skip", "propagate"]

#: A layer's name, and whether elements of it are counted, not rows.
Unit = tuple[str, bool]


class Counted(NamedTuple):
    """What a step left out.

    Args:
        counts: of each layer, int64 ``[layers]``.
        units: for each layer.
        capturable: whether such a step may be captured into a graph, which needs a place to count in.
    """

    counts: Tensor
    units: Sequence[Unit]
    capturable: bool


class LeftOut:
    """Counts of an optimizer's steps that have yet to be judged. Neither copied nor pickled with it."""

    def __init__(self) -> None:
        self._late: deque[tuple[Tensor, Any, Sequence[Unit]]] = deque()
        #: Where a graph of the layers that were stepped last would count; and what graphs have counted since it was
        #: looked at last.
        self._place: tuple[Sequence[Unit], Tensor] | None = None
        self._captured: list[tuple[Sequence[Unit], Tensor]] = []

    @staticmethod
    def is_late(counts: Tensor) -> bool:
        """Whether to read them would be to wait."""
        return counts.device.type != "cpu"

    @_disable_dynamo
    def take(self, step: Counted, nonfinite: NonFinite, skipped: Counter[str]) -> None:
        """Judge what the step that was just made left out, or remember to.

        Args:
            step: its counts.
            nonfinite, skipped: as in `judge`.

        Raises:
            FloatingPointError: something was left out, the counts are on the CPU, and ``nonfinite="raise"``.
        """
        counts, units, capturable = step
        if capturing():
            self.add_captured(counts, units)
        elif self.is_late(counts):
            self.add(counts, units, capturable=capturable)
        elif bool(counts.any()):
            _judge(nonfinite, skipped, [_by_layer(counts, units)], "")

    def add(self, counts: Tensor, units: Sequence[Unit], *, capturable: bool = False) -> None:
        """Take the counts of a step, and begin to copy them to the host.

        Args:
            counts: of each layer, int64 ``[layers]``.
            units: for each layer.
            capturable: whether such a step may be captured into a graph, which needs a place to count in.
        """
        if capturable and (self._place is None or self._place[0] != units):
            self._place = units, torch.zeros_like(counts)
        self._copy(counts, units)

    def add_captured(self, counts: Tensor, units: Sequence[Unit]) -> None:
        """Have every replay of the graph that is being captured add what it left out.

        Args:
            counts: of each layer, int64 ``[layers]``.
            units: for each layer.

        Raises:
            RuntimeError: these layers were not stepped together outside of a graph before.
        """
        if self._place is None or self._place[0] != units:
            raise RuntimeError(
                "a graph is captured of a step of other layers than were stepped before; make a few steps with the "
                "same gradients on a side stream first, as torch's documentation of CUDA graphs says"
            )
        self._place[1].add_(counts)
        if all(place is not self._place for place in self._captured):
            self._captured.append(self._place)

    def _copy(self, counts: Tensor, units: Sequence[Unit]) -> None:
        # To pinned memory, which torch takes for such copies; where nothing says when one is done (MPS), it waits.
        says = hasattr(torch.get_device_module(counts.device), "current_stream")
        copied = counts.to("cpu", non_blocking=says)
        if not is_fake_tensor(copied):
            self._late.append((copied, _event(counts.device) if says else None, units))

    @_disable_dynamo  # nothing of it can be compiled
    def judge(self, nonfinite: NonFinite, skipped: Counter[str], *, wait: bool) -> None:
        """Raise, or warn and count, for what earlier steps left out and was not judged yet.

        Args:
            nonfinite: which.
            skipped: in how many steps something of a layer was left out; counted here.
            wait: for the device, if it is not done with these steps.

        Raises:
            FloatingPointError: something was left out, and ``nonfinite="raise"``. It is judged then.
        """
        if capturing():
            return  # nothing can be asked meanwhile
        for units, total in self._captured:
            self._copy(total.clone(), units)
            total.zero_()
        found: list[dict[str, list[int]]] = []
        wait = wait or several_ranks()
        while self._late:
            counts, event, units = self._late[0]
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                break
            self._late.popleft()
            if bool(counts.any()):
                found.append(_by_layer(counts, units))
        if found:
            _judge(nonfinite, skipped, found, " in an earlier step")


def _judge(nonfinite: NonFinite, skipped: Counter[str], steps: list[dict[str, list[int]]], when: str) -> None:
    if nonfinite == "raise":
        total: dict[str, list[int]] = {}
        for step in steps:
            for fqn, (rows, elements) in step.items():
                before = total.get(fqn, [0, 0])
                total[fqn] = [before[0] + rows, before[1] + elements]
        named = ", ".join(f"{fqn} ({_words(*count)})" for fqn, count in total.items())
        raise FloatingPointError(
            f"NaN or inf in the gradient of {named}{when}. "
            "They were left out: parameters and states did not change there. Everything else was stepped, layers "
            "without a codec by torch, which lets NaN through: after a loss that was NaN go back to a checkpoint, or "
            "have clip_grad_norm_(..., error_if_nonfinite=True) stop before the step. Use compress(..., "
            'nonfinite="skip") to have such rows left out with a warning, or "propagate" to let them through as '
            "torch.optim does. Under Factored rows count as infinite from a mean square of 1e27"
        )
    for step in steps:
        for fqn, count in step.items():
            skipped[fqn] += 1
            if skipped[fqn] == 1:
                said = f"NaN or inf in the gradient of {fqn}: {_words(*count)} left out of the step"
                warnings.warn(said, stacklevel=_caller())


def _by_layer(counts: Tensor, units: Sequence[Unit]) -> dict[str, list[int]]:
    """Rows and elements of each layer that has any; parts of a layer that lie apart are put together."""
    found: dict[str, list[int]] = {}
    for count, (fqn, by_element) in zip(counts.tolist(), units, strict=True):
        if count:
            found.setdefault(fqn, [0, 0])[by_element] += count
    return found


def _words(rows: int, elements: int) -> str:
    parts = (f"{n:,} {word}{'s' if n != 1 else ''}" for n, word in ((rows, "row"), (elements, "element")) if n)
    return ", ".join(parts)


def _event(device: torch.device) -> Any:
    """An event that a device reaches when it has done all that it was asked for."""
    module = torch.get_device_module(device)
    event = module.Event()
    event.record(module.current_stream(device))  # not that of the current device, which may be another
    return event


def _caller() -> int:
    """The `stacklevel` of who called into this package, in `_judge`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(("lightning_sketch.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level
