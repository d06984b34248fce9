"""What a converted optimizer remembers beside its groups and state."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_sketch.layers.flat import FlatTensors
from lightning_sketch.layers.record import RECORDS, LayerRecord
from lightning_sketch.optimizer.bindings import Bindings
from lightning_sketch.optimizer.bound import PendingUpdate
from lightning_sketch.optimizer.nonfinite import Counted, LeftOut, NonFinite
from lightning_sketch.policy.plan import Plan
from lightning_sketch.policy.policy import Policy


class StepMonitor(Protocol):
    """What gives converted optimizers a `StepWatcher`; see `lightning_sketch.monitor`."""

    def check(
        self, layers: Iterable[LayerRecord], groups: Iterable[Mapping[str, Any]], *, step_in_backward: bool
    ) -> None:
        """Raise ValueError if these layers of an optimizer cannot be watched."""

    def attach(self, optimizer: Any) -> None:
        """Watch a converted optimizer."""


class StepWatcher(Protocol):
    """What is told of every step of compressed layers; see `lightning_sketch.monitor`."""

    def before(self, optimizer: Any, ready: Sequence[PendingUpdate]) -> Any:
        """Take from gradients and states what the step will change.

        Raises:
            RuntimeError: such a step cannot be watched. Nothing was changed then.
        """

    def after(self, optimizer: Any, taken: Any, counted: Counted | None) -> None:
        """The step was made. Collective in some steps, the same on all ranks.

        Args:
            taken: what `before` returned.
            counted: what the step left out.
        """

    def forget(self, layers: Collection[str] | None = None) -> None:
        """States of these layers, or of all, were replaced from outside."""


@dataclass
class Compression:
    """What a converted optimizer remembers beside its groups and state.

    Args:
        policy: the policy that decided.
        model: weak reference to the model, to resolve parameters that are added later.
        nonfinite: what to do about NaN and inf gradients of compressed layers.
        records: the record of every compressed layer. Groups hold them too, but under DeepSpeed not all groups are to
            be seen at all times.
        names: for each group the FQNs of all its parameters, in order.
        errors: relative error of each state that was encoded from a dense one, by FQN and state.
        skipped: in how many steps something of a layer was left out, because its gradient was not finite.
        plain: the user's plain tensors beside the model's parameters, which torch steps. A tensor that is no
            ``nn.Parameter`` and not among them was put in place of the parameters by an engine.
        step_in_backward: whether compressed layers are stepped in backward.

    Attributes:
        flat: what lies in DeepSpeed's flat tensors; ``None`` until they are known.
        bindings: parameters and states, ready to be stepped.
        left_out: what steps left out and was not judged yet.
        stepping: whether ``step`` is running.
        watcher: what is told of steps; ``None`` for nothing.
    """

    policy: Policy | None
    model: Callable[[], nn.Module | None]
    nonfinite: NonFinite
    records: list[str] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    plain: list[Tensor] = field(default_factory=list)
    step_in_backward: bool = False
    # Of this object alone: copies and pickles begin without.
    flat: FlatTensors | None = field(default=None, init=False, repr=False)
    bindings: Bindings = field(default_factory=Bindings, init=False, repr=False)
    left_out: LeftOut = field(default_factory=LeftOut, init=False, repr=False)
    stepping: bool = field(default=False, init=False, repr=False)
    watcher: StepWatcher | None = field(default=None, init=False, repr=False)

    def describe(self, made: Plan) -> None:
        """Take records and names from the plan of all groups."""
        self.records = [x.record for x in made.layers if x.record is not None]
        self.names = [[x.layer.fqn for x in group] for group in made.groups]

    def remember_plain(self, groups: list[dict[str, Any]]) -> None:
        """Take the plain tensors in `groups` for the user's own."""
        self.plain += [param for group in groups for param in group["params"] if not isinstance(param, nn.Parameter)]

    def replace_record(self, group: dict[str, Any], index: int, new: str) -> None:
        """Put another record in the place of a group's at `index`, and among `records`."""
        old, group[RECORDS][index] = group[RECORDS][index], new
        self.records = [new if record == old else record for record in self.records]

    def states_replaced(self, layers: Collection[str] | None = None) -> None:
        """Tell whoever watches that states of these layers, or of all, were replaced."""
        if self.watcher is not None:
            self.watcher.forget(layers)

    def take_left_out(self, step: Counted) -> None:
        """Raise, or warn and count, for what the step that was just made left out; see `LeftOut.take`."""
        self.left_out.take(step, self.nonfinite, self.skipped)

    def judge_left_out(self, *, wait: bool) -> None:
        """Raise, or warn and count, for what earlier steps left out; see `LeftOut.judge`."""
        self.left_out.judge(self.nonfinite, self.skipped, wait=wait)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        # The model's copy, where it was made before; where it is made after, `find_model` finds it.
        model = memo.get(id(self.model()))
        reference = _no_model if model is None else weakref.ref(model)
        copies = list(self.records), [list(names) for names in self.names], dict(self.errors), self.skipped.copy()
        return Compression(
            self.policy, reference, self.nonfinite, *copies, copy.deepcopy(self.plain, memo), self.step_in_backward
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A model cannot travel by weak reference, nor a policy with a lambda; only add_param_group needs them.
        portable = self.policy is not None and all(rule.match is None for rule in self.policy.rules)
        policy = self.policy if portable else None
        kept = self.records, self.names, self.errors, self.skipped, self.plain, self.step_in_backward
        return Compression, (policy, _no_model, self.nonfinite, *kept)


def _no_model() -> None:
    return None
