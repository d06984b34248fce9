"""What an optimizer without a rule keeps, learned from steps that it makes with small parameters of its own."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch.rules import Count, StateDef
from lightning_sketch.rules.stock_pieces import step_in_pieces
from lightning_sketch.sharding import global_shape, local

#: Largest sizes of a small parameter, by dimension (from the third on the last). More than 128, from which on Adafactor
#: and its like factor their states; and different, so that a state's shape says which dimensions it has.
_SIZES = (136, 144, 4)
#: Magnitudes of the gradients of three steps: small ones first, and one that a clipping optimizer clips.
_MAGNITUDES = (1e-2, 1.0, 1e2)
#: Relative distance from the parameter up to which a state holds weights, after a step with a small gradient.
_LIKE_WEIGHTS = 0.5


@dataclass(frozen=True)
class Learned:
    """What an optimizer keeps of one parameter.

    Args:
        states: states shaped like the parameter and in its dtype.
        count: how it keeps ``step``.
    """

    states: tuple[StateDef, ...]
    count: Count


def learn(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> Learned:
    """What `optimizer` keeps of a parameter of that shape and dtype in that group. Changes nothing.

    Raises:
        TypeError: it cannot be found out.
    """
    shape = tuple(min(n, _SIZES[min(i, len(_SIZES) - 1)]) for i, n in enumerate(global_shape(param)))
    if 0 in shape:
        shape = tuple(max(1, n) for n in shape)
    seen: dict[str, list[Tensor]] = {}
    first: Exception | None = None
    with _undisturbed():
        for closed, seed_states in itertools.product((False, True), repeat=2):
            seen.clear()
            probe = _Probe(optimizer, [(group, [(shape, param)])], seed_states=seed_states)
            try:
                weights = [probe.step(magnitude, seen, closed=closed) for magnitude in _MAGNITUDES]
                break
            except Exception as error:  # whatever a step of somebody else's raises; the next way may suit it
                first = error if first is None else first
        else:
            raise TypeError(
                f"{type(optimizer).__name__} cannot be compressed: a step of it with a small parameter, to learn which "
                f"states it keeps, ended in {type(first).__name__}: {first}"
            ) from first
    states = []
    for name, values in seen.items():
        signed = any(bool((value < 0).any()) for value in values)
        states.append(StateDef(name, signed, weights=_is_weights(values[0], weights[0])))
    step = probe.entry.get("step")
    return Learned(tuple(states), "none" if step is None else "tensor" if isinstance(step, Tensor) else "number")


def steps_apart(optimizer: Optimizer) -> bool:
    """Whether the optimizer's steps over some parameters at a time, closure first, are its step over all of them.

    Tried with two small parameters of every group: parameters, states and options must be the same bits.
    """
    groups = optimizer.param_groups[: len(_SIZES) + 1]
    like = [(group, [(_small(p), p) for p in (group["params"] * 2)[:2]]) for group in groups if group["params"]]
    if not like:
        return True
    with _undisturbed():
        try:
            whole, apart = (_Probe(optimizer, like, seed_states=bool(_eager(optimizer))) for _ in range(2))
            for magnitude in _MAGNITUDES:
                whole.step(magnitude)
                apart.step(magnitude, in_pieces=True)
            if not whole.same(apart):
                return False
            if "closure" not in inspect.signature(_own_step(optimizer)).parameters:
                return True
            closed = _Probe(optimizer, like, seed_states=bool(_eager(optimizer)))
            for magnitude in _MAGNITUDES:
                if closed.step_with_closure(magnitude) != 1:
                    return False
            return whole.same(closed)
        except Exception:  # whatever it wants, a closure or all of its parameters, it is given
            return False


class _Probe:
    """An optimizer of the same class, options and attributes over small parameters.

    Args:
        like: groups, and for each the shapes of its small parameters and the parameters that they stand for.
        seed_states: whether the states start as constants that the optimizer's states hold: some optimizers allocate
            them in their constructors.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        like: Sequence[tuple[Mapping[str, Any], Sequence[tuple[tuple[int, ...], Tensor]]]],
        *,
        seed_states: bool,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = stock_class(optimizer).__new__(stock_class(optimizer))
        attributes = {k: _copied(v, k) for k, v in vars(optimizer).items() if k not in _NOT_COPIED}
        self.optimizer.__dict__.update(attributes)
        for hooks in [k for k in vars(optimizer) if k.startswith("_optimizer_") and k.endswith("_hooks")]:
            self.optimizer.__dict__[hooks] = OrderedDict()
        _refuse_held_parameters(optimizer)
        self.optimizer.defaults = dict(optimizer.defaults)
        self.optimizer.state = defaultdict(dict)
        self.optimizer.param_groups = []
        for group, shapes in like:
            params = []
            for shape, real in shapes:
                device = "cpu" if real.is_meta else real.device
                values = torch.randn(shape, generator=self.generator, device="cpu").to(device, real.dtype)
                params.append(nn.Parameter(values))
                if seed_states:
                    self.optimizer.state[params[-1]] = _constant_states(optimizer, real, values)
            options = {k: _copied(v, k) for k, v in group.items() if k not in ("params", "compression")}
            unsupported = {k: False for k in ("capturable", "differentiable", "fused") if options.get(k)}
            self.optimizer.param_groups.append({**options, **unsupported, "params": params})
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._step = _own_step(optimizer)

    @property
    def entry(self) -> dict[str, Any]:
        """The states of the first parameter."""
        found: dict[str, Any] = self.optimizer.state.get(self.params[0], {})
        return found

    def step(
        self,
        magnitude: float,
        seen: dict[str, list[Tensor]] | None = None,
        *,
        in_pieces: bool = False,
        closed: bool = False,
    ) -> Tensor:
        """Make a step; the first parameter as it was before.

        Args:
            seen: takes the states of the first parameter after the step, by name.
            in_pieces: make it by some parameters at a time.
            closed: have a closure make the gradients.
        """
        before: Tensor = self.params[0].detach().clone()
        if not closed:
            self._give_gradients(magnitude)
        if closed:
            self.step_with_closure(magnitude)
        elif in_pieces:
            groups = self.optimizer.param_groups
            pieces = [{0: groups[0]["params"][:1]}]
            for i, (group, following) in enumerate(itertools.pairwise(groups)):
                pieces.append({i: group["params"][1:], i + 1: following["params"][:1]})
            pieces += [{len(groups) - 1: groups[-1]["params"][1:]}]
            step_in_pieces(self.optimizer, pieces, lambda _: self._step(self.optimizer))
        else:
            self._step(self.optimizer)
        if seen is not None:
            _note(self, seen)
        return before

    def step_with_closure(self, magnitude: float) -> int:
        """Make a step whose closure makes the gradients; how often it was called."""
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 1:
                self._give_gradients(magnitude)
            return torch.zeros((), device="cpu")

        for param in self.params:
            param.grad = None
        self._step(self.optimizer, closure)
        return calls

    def same(self, other: _Probe) -> bool:
        """Whether both ended in the same bits."""
        mine, others = self.optimizer, other.optimizer
        if any(
            a.keys() != b.keys() or not all(_equal(a[k], b[k]) for k in a if k != "params")
            for a, b in zip(mine.param_groups, others.param_groups, strict=True)
        ):
            return False
        return all(
            _equal(p, q) and _equal(dict(mine.state.get(p, {})), dict(others.state.get(q, {})))
            for p, q in zip(self.params, other.params, strict=True)
        )

    def _give_gradients(self, magnitude: float) -> None:
        for param in self.params:
            values = torch.randn(param.shape, generator=self.generator, device="cpu")
            param.grad = (magnitude * values).to(param.device, param.dtype)


#: Attributes of an optimizer that a probe has of its own, or does without.
_NOT_COPIED = {"state", "param_groups", "defaults", "step", "_compression", "_bindings", "_stock_rule", "_apart"}


def stock_class(optimizer: Optimizer) -> type[Optimizer]:
    """The class of an optimizer before it was converted."""
    found: type[Optimizer] = getattr(type(optimizer), "stock", type(optimizer))
    return found


def _own_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The class's step without torch's hooks around it."""
    step: Any = stock_class(optimizer).step
    while getattr(step, "hooked", None) is True and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def _note(probe: _Probe, seen: dict[str, list[Tensor]]) -> None:
    """Take down the states that are shaped like the parameter."""
    param = probe.params[0]
    for name, value in probe.entry.items():
        fits = isinstance(value, Tensor) and value.shape == param.shape and value.dtype == param.dtype
        if fits and value.is_floating_point() and isinstance(name, str) and name != "step":
            seen.setdefault(name, []).append(value.detach().clone())


def _is_weights(state: Tensor, param: Tensor) -> bool:
    if param.ndim == 0:
        return False
    distance = (state.double() - param.double()).norm()
    return bool(distance < _LIKE_WEIGHTS * param.double().norm())


def _small(param: Tensor) -> tuple[int, ...]:
    return tuple(max(1, min(n, 4 + 2 * i)) for i, n in enumerate(global_shape(param)))


def _eager(optimizer: Optimizer) -> list[Tensor]:
    """Parameters with states that were never stepped."""
    return [p for p, state in optimizer.state.items() if state and _count(state) == 0]


def _count(state: Mapping[str, Any]) -> float:
    step = state.get("step", math.nan)
    return float(step) if not isinstance(step, Tensor) or step.numel() == 1 else math.nan


def _constant_states(optimizer: Optimizer, real: Tensor, small: Tensor) -> dict[str, Any]:
    """States such as the optimizer allocated for a parameter, for a small one."""
    made: dict[str, Any] = {}
    for name, value in optimizer.state.get(real, {}).items():
        if isinstance(value, Tensor) and value.shape == real.shape and value.ndim > 0:
            held = local(value).reshape(-1)[:1]
            made[name] = torch.full_like(small, float(held.sum()))
        else:
            made[name] = _copied(value, name)
    return made


def _refuse_held_parameters(optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        if name not in _NOT_COPIED and any(id(x) in held for x in _tensors_in(value, nested=2)):
            raise TypeError(
                f"{type(optimizer).__name__} cannot be compressed: it holds its parameters in its attribute "
                f"{name!r}, too, so it cannot be made to step some of them at a time"
            )


def _tensors_in(value: Any, nested: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif nested and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item, nested - 1)


def _copied(value: Any, name: Any) -> Any:
    """A copy that a step may change: of numbers, tensors and containers of them. What else there is is shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple | dict | set) and type(value) in (list, tuple, dict, set, OrderedDict):
        if isinstance(value, dict):
            return type(value)((k, _copied(v, k)) for k, v in value.items())
        return type(value)(_copied(v, name) for v in value)
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a is b or a == b)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No trace of a probe: in torch's random numbers, and among warnings."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield
