"""A state that a codec stores: what it is of, and the operations of a step on it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_sketch.codecs.shared import Shared
from lightning_sketch.kernels import huge_pages
from lightning_sketch.kernels.schema import KernelState
from lightning_sketch.sharding import Block, Shard

#: A number of a step, and the step's own: on the host, or 0-d float64 where the numbers stay on the device.
Number = float | Tensor
Count = int | Tensor

#: What lies in ``optimizer.state[param]``: tensors only, because training code moves and measures all of its values as
#: such. Scalars that the host reads every step are 0-d and on the CPU, as torch's ``step`` is.
Tensors = MutableMapping[str, Any]


@dataclass(frozen=True)
class StateSpec:
    """One state of one layer.

    Args:
        name: torch's own name, e.g. ``exp_avg_sq``.
        fqn: the layer's name, for error messages.
        signed: whether values may be negative (first moments) or not (second moments).
        shard: the rows held here.
        seed: hash seed of the layer; the same for all its states, so that a row's moments share their collisions.
        dtype: dtype of arithmetic and of compressed tensors: float32, or float64 for float64 parameters.
        param_dtype: dtype of the parameter, in which torch keeps a dense state.
        device: where the state lives.
        fill: initial value (Adagrad's ``initial_accumulator_value``).
        on_device: whether the numbers of steps, the scale among them, stay on the state's device.
    """

    name: str
    fqn: str
    signed: bool
    shard: Shard
    seed: int
    dtype: torch.dtype
    param_dtype: torch.dtype
    device: torch.device
    fill: float = 0.0
    on_device: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shard.local_shape

    def alike(self) -> StateSpec:
        """What specs of the same state of other layers have in common, which may only differ in name and seed."""
        return dataclasses.replace(self, fqn="", seed=0)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the given shape holding the initial value."""
        return huge_pages.full(shape, self.fill, dtype or self.dtype, self.device)


class Entry:
    """An attribute of a `CodecState` that is its tensor under a suffix, looked up whenever it is asked for.

    States outlive steps, and hold on to no tensor: memory is free as soon as a state is moved away or dropped.
    """

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def __get__(self, state: CodecState, owner: type[CodecState]) -> Tensor:
        found: Tensor = state.tensors[key_of(state.spec.name, self.suffix)]
        return found


class CodecState(ABC):
    """A codec bound to its tensors: the operations an update rule needs.

    One step is ``begin``, then ``add`` for every block, ``settle``, then ``read`` for every block, ``commit``. With
    ``s`` the stored state and ``x`` the step's new values, it computes ``s <- decay * s + weight * x`` and returns
    ``s`` at the rows of each block. Every moment of every supported optimizer is of this form: an EMA has
    ``decay = beta, weight = 1 - beta``, Adagrad's sum ``1, 1``, a momentum buffer ``momentum, 1 - dampening``.
    """

    #: Whether a rule is to hold this first moment to the bound of exact ones, which an estimate may break; see
    #: `rules.base.moment_bound`.
    bounded: bool = False
    #: Whether every element is stored by itself.
    elementwise: bool = False
    #: Whether `add` folds in the values, and whether `read` looks at them. Where neither does, nobody need make them.
    adds_values: ClassVar[bool] = True
    #: Whether `observe` looks at the values that a step will add.
    observes: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    #: Whether the step that begins is a fused kernel's which finds the numbers of the step on the device: then `begin`
    #: lets nothing decay, and `to_kernel` says weights as if no scale had decayed.
    deferred: bool = False
    #: Whether `begin` changes nothing but a scale, and what `to_kernel` says but tensors and the seed follows from
    #: `StateSpec.alike`, the codec, the scale and what `begin` is given. From step to step seeds of such states go on
    #: by the same number.
    can_follow: ClassVar[bool] = False
    #: Whether estimates of all rows share sums of squares: then a row of too large ones is left out, see `MOST_MEAN`.
    shares_squares: ClassVar[bool] = False
    #: Whether `observe_sums` serves in its place.
    takes_sums: ClassVar[bool] = False
    #: What all ranks add in the step that is to begin, where they share the state; `begin` takes it.
    shared: Shared | None = None
    #: Whether `begin` has folded in all that the step adds, so that `add` has nothing left to do.
    observed: bool = False

    def __init__(self, spec: StateSpec, tensors: Tensors) -> None:
        self.spec = spec
        self.tensors = tensors

    def __getitem__(self, suffix: str) -> Any:
        return self.tensors[key_of(self.spec.name, suffix)]

    def __setitem__(self, suffix: str, value: Any) -> None:
        self.tensors[key_of(self.spec.name, suffix)] = value

    def share(self, shared: Shared) -> None:
        """Take part in a step that ranks agree on: `shared` is where `offer` and `observe` are to add."""
        self.shared = shared

    def forget_shared(self) -> None:
        """The step is not made, because no rank has a gradient."""
        self.shared = None

    def offer(self) -> None:  # noqa: B027
        """Add to `shared` what other ranks must know of the state as it is."""

    @property
    def observes_agreed(self) -> bool:
        """Whether there are sums of this rank alone over rows that lie on others, too."""
        return False

    def observe(self, block: Block, x: Tensor) -> None:  # noqa: B027
        """Add to `shared` what the step will add here, before `weight`; the state does not change.

        Args:
            x: as in `add`.
        """

    def finish_observing(self, rows: Tensor | None) -> None:  # noqa: B027
        """All blocks were observed.

        Args:
            rows: local ids of their rows, ``None`` for all.
        """

    def observe_sums(self, block: Block, means: Tensor, columns: Tensor | None) -> None:
        """Where `takes_sums`: as `observe` of the squares of a gradient, whose sums a kernel has made.

        Args:
            block: all rows of the gradient.
            means: of the squares of each row here, float32 ``[k]``.
            columns: sums of the squares of each column here, float32 ``[row_numel]``; ``None`` unless `wants_columns`.
        """
        raise NotImplementedError

    @property
    def wants_columns(self) -> bool:
        """Whether `observe_sums` needs sums of columns in this step."""
        return False

    def observe_agreed(self, block: Block, x: Tensor) -> None:
        """Where `observes_agreed`: as `observe`, after the ranks agreed, so that all leave out the same rows."""
        raise NotImplementedError

    def observe_agreed_sums(self, columns: Tensor) -> None:
        """Where `takes_sums` and `observes_agreed`: `observe_agreed`, whose sums of columns a kernel has made."""
        raise NotImplementedError

    @abstractmethod
    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        """Start a step: remember `weight`, let what is stored decay.

        Where ``spec.on_device``, numbers may be 0-d float64 tensors there, which nothing must wait for.

        Args:
            decay: factor on the stored state, in [0, 1].
            weight: factor on the values that follow.
            step: the layer's step number, from 1.
            rows: local ids of all rows that will be added, ``None`` for all.
        """

    def add(self, block: Block, x: Tensor) -> None:  # noqa: B027  (codecs that fold `x` in while reading need none)
        """Fold in ``x``, ``[k, *row_shape]`` in ``spec.dtype``; 0 where ``block.good`` is False."""

    def settle(self) -> None:  # noqa: B027
        """All blocks were added."""

    @abstractmethod
    def read(self, block: Block, x: Tensor) -> Tensor:
        """The state after this step at the block's rows, broadcastable to ``[k, *row_shape]``; not to be modified.

        Args:
            x: the same values that were added; anything if not `reads_values`.
        """

    def commit(self) -> None:  # noqa: B027
        """All blocks were read: make the step permanent."""

    def fusable(self) -> bool:
        """Whether fused kernels take this state; if so, `to_kernel` says how."""
        return False

    def to_kernel(self) -> KernelState:
        """What a fused kernel needs to do ``add``, ``settle``, ``read`` and ``commit``; after ``begin``."""
        raise NotImplementedError

    def deferred_scale(self) -> tuple[Tensor | None, float]:
        """The scale, if there is one, and by what it is to decay, of a step that is `deferred`."""
        return None, 1.0

    @property
    def renormalized(self) -> bool:
        """Whether the step that was begun last has multiplied what is stored by its scale."""
        return False

    def follow(self, leader: CodecState) -> None:  # noqa: B027
        """Let the scale decay as `leader`'s did, which was the same, in the step that it began."""

    def rebound(self, seed: Any, tensors: Tensors) -> Self:
        """The same state of another layer that differs in values and in its seed alone.

        Args:
            seed: an integer, or int64, 0-d, on the state's device.
            tensors: as in ``optimizer.state[param]``; without the scale if that is on the host: it starts as here.
        """
        other = copy.copy(self)
        other.spec, other.tensors = dataclasses.replace(self.spec, seed=seed), tensors
        return other

    def host_scale(self) -> float | None:
        """The scale, if there is one on the host."""
        return None

    def take_scale(self, other: CodecState) -> None:  # noqa: B027
        """Let the scale on the host be what it is after another layer's step, see `rebound`."""

    @staticmethod
    def plain(tensor: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> bool:
        """Whether a kernel may take a tensor's memory for `numel` numbers of that dtype."""
        return tensor.numel() == numel and tensor.dtype == dtype and tensor.is_contiguous()

    @abstractmethod
    def estimate(self, block: Block) -> Tensor:
        """The stored state at the block's rows, broadcastable to ``[k, *row_shape]``; not to be modified."""

    def as_read(self, estimate: Tensor) -> Tensor:
        """What `read` would give where `estimate` gave this: another value where a codec adds to it for steps."""
        return estimate


def add_scaled(target: Tensor, x: Tensor, weight: Number) -> Tensor:
    """``target += weight * x`` (modified in place), wherever the weight is."""
    return target.add_(x * weight) if isinstance(weight, Tensor) else target.add_(x, alpha=weight)


@functools.cache  # asked for several times a step for every state; there are few
def key_of(state: str, suffix: str) -> str:
    """Key in ``optimizer.state[param]``, e.g. ``exp_avg_sq_table``."""
    return f"{state}_{suffix}" if suffix else state
