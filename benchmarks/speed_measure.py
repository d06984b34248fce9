"""Steps of several optimizers, timed in turn; bytes of their states and of their temporaries."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.roofline import Timed, wall_time
from benchmarks.step_cost import transient

Row = dict[str, Any]
Temporaries = Callable[[Optimizer, tuple[Tensor, ...]], int]  # the most bytes allocated in a step with these gradients


@dataclass(frozen=True)
class Contestant:
    """An optimizer in a race.

    Args:
        key: which optimizer and codecs; rows of the same key differ in `nonfinite` only.
        label: for tables.
        optimizer: its parameters may be another contestant's too.
        gradients: a few, used in turn; each has one tensor for each parameter.
        moved: bytes that one step has to move between memory and processor at least.
        against: name of the contestant that the ratio is against.
        nonfinite: ``compress``'s option; ``None`` for what is not ours.
        may_fail: whether an exception is a result (a peer that cannot do this) or a bug.
        keep: whatever must stay alive; a converted optimizer knows its model by weak reference.
    """

    key: str
    label: str
    optimizer: Optimizer
    gradients: Sequence[Sequence[Tensor]]
    moved: float
    against: str
    nonfinite: str | None = None
    may_fail: bool = False
    keep: Any = None

    @property
    def name(self) -> str:
        return self.key if self.nonfinite is None else f"{self.key}/{self.nonfinite}"

    @property
    def parameters(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]


def race(
    contestants: Sequence[Contestant],
    *,
    warm_up: int,
    rounds: int,
    timed: Timed = wall_time,
    temporaries: Temporaries = transient,
) -> list[Row]:
    """Step all optimizers in turn, round after round, so that a disturbance of the machine hits all of them.

    Who goes first, and which gradient it gets, moves on from round to round: nobody always finds the caches as the same
    other one left them.

    Returns:
        a row for each contestant; one that failed has ``error`` in place of measurements.
    """
    errors = {entry.name: error for entry in contestants if (error := _first_step(entry, timed)) is not None}
    running = [entry for entry in contestants if entry.name not in errors]
    seconds: dict[str, list[float]] = {entry.name: [] for entry in running}
    gc.collect()
    gc.disable()  # a collection would be billed to whoever allocates next
    try:
        for i in range(warm_up + rounds):
            for j in range(len(running)):
                entry = running[(i + j) % len(running)]
                taken = _step(entry, entry.gradients[(i + j) % len(entry.gradients)], timed)
                if i >= warm_up:
                    seconds[entry.name].append(taken)
    finally:
        gc.enable()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    rows = []
    for entry in contestants:
        row: Row = {"name": entry.name, "key": entry.key, "label": entry.label, "nonfinite": entry.nonfinite}
        if entry.name in errors:
            rows.append(row | {"error": errors[entry.name]})
            continue
        low, middle, high = statistics.quantiles(seconds[entry.name], n=4, method="inclusive")
        rows.append(
            row
            | {"milliseconds": 1e3 * middle, "quartiles": [1e3 * low, 1e3 * high], "rounds": rounds}
            | {"against": entry.against, "ratio": medians[entry.name] / medians[entry.against]}
            | {"bytes_moved": entry.moved}
            | _bytes(entry, temporaries)
        )
    return rows


def tensor_bytes(value: Any) -> int:
    """Bytes that a state holds: of tensors, of tensor subclasses' inner tensors, and of what containers hold."""
    if isinstance(value, Mapping):
        return sum(tensor_bytes(inner) for key, inner in value.items() if key != "step")
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):  # quantised states and DTensors say a logical size, not what they hold
        return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def gradient_bytes(grad: Tensor) -> int:
    """Bytes of a gradient; of a sparse one, of its indices and values."""
    if grad.is_sparse:
        return tensor_bytes(grad._indices()) + tensor_bytes(grad._values())
    return tensor_bytes(grad)


def _first_step(entry: Contestant, timed: Timed) -> str | None:
    """Allocate the states, and compile what compiles. Returns the text of an error."""
    try:
        _step(entry, entry.gradients[0], timed)
    except Exception as error:
        if not entry.may_fail:
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _step(entry: Contestant, gradients: Sequence[Tensor], timed: Timed) -> float:
    """Seconds of one step. Gradients are taken away again: others step the same parameters."""
    parameters = entry.parameters
    for param, grad in zip(parameters, gradients, strict=True):
        param.grad = grad
    taken = timed(entry.optimizer.step)
    for param in parameters:
        param.grad = None
    return taken


def _bytes(entry: Contestant, temporaries: Temporaries) -> Row:
    numel = sum(param.numel() for param in entry.parameters)
    state = sum(tensor_bytes(dict(held)) for held in entry.optimizer.state.values())
    own = sum(map(gradient_bytes, entry.gradients[0]))
    temporary = temporaries(entry.optimizer, tuple(entry.gradients[0]))
    return {
        "parameters": numel,
        "state_bytes_per_parameter": state / numel,
        "transient_bytes_per_parameter": temporary / numel,
        "transient_bytes": temporary,
        "transient_per_gradient_byte": temporary / own,
    }
