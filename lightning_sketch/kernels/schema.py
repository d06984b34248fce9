"""What a fused kernel sees of one step of one layer: the states as they are stored, and the rule as numbers.

Kinds and fields are listed in fields.py, in the order in which kernels have them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.kernels.fields import STATE, STEP, DType, Field, Kind, Source


@dataclass(slots=True)  # not frozen: that triples what making one costs, and every step makes them
class KernelState:
    """A codec state after ``begin``: ``s <- decay * s + weight * x``.

    Args:
        kind: how it is stored.
        data: the tensor that `kind` says.
        columns: column accumulators, ``row_shape`` (SM3, FACTORED); ``[rows, blocks]`` (QUANTIZED).
        decay: factor of what is stored; 1 where the scale has decayed already.
        weight: factor of x, divided by the scale already where values are stored so (but for SM3). 0 for a state of
            rows, a sketch of row scalars or a factored one that holds this step already: then no sums are made.
        column_weight: the same of the column sums (FACTORED); factor of the columns (SM3).
        scale: true value = stored value * scale.
        is_signed: whether a sketch or codes have signs.
        depth, width: of a sketch; bits and block (QUANTIZED).
        seed: of a sketch's hashes, or of the rounding noise.
        floor: how many times the mean of all rows is added to each where it is read (FACTORED).
        scale_at: where the numbers of steps stay on the device, the scale, 0-d float64; ``None`` if there is none.
            Nothing has decayed then, and weights are not divided yet.
        scale_decay: by which that scale is to decay.
    """

    kind: Kind
    data: Tensor
    columns: Tensor | None = None
    decay: float | Tensor = 1.0
    weight: float | Tensor = 1.0
    column_weight: float | Tensor = 0.0
    scale: float | Tensor = 1.0
    is_signed: bool = False
    depth: int = 0
    width: int = 0
    seed: int = 0
    floor: float = 0.0
    scale_at: Tensor | None = None
    scale_decay: float = 1.0

    @property
    def dtype(self) -> DType:
        return _DTYPES.get(self.data.dtype, DType.FLOAT32)  # codes are integers


@dataclass(slots=True)
class DeviceNumbers:
    """What a step of a layer takes from the device; 0-d tensors there.

    Args:
        step: number of this step, float64.
        found_inf: 1 where nothing is to change, as a gradient scaler says; ``None`` for never.
        grad_scale: what the gradient is to be divided by; ``None`` for nothing.
    """

    step: Tensor
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


@dataclass(slots=True)
class StepCache:
    """What is found out once about a layer's steps, for as long as its parameter and states are laid out the same.

    Args:
        fusable: whether kernels take its states; ``None`` before that was asked.
        laid: how Triton's kernels are launched for such a step, and what of it that depends on.
        program: the last step of all layers of which this is the first, if it can be made again: a `Program`.
        orders: Triton's orders of its rows by bucket of the second and the first state's sketch: memory of the device.
        resident: of steps whose numbers stay on the device, what lies there of all layers of which this is the first.
        seeds: of the layers that the reference steps with this one, and where they lie on the device.
    """

    fusable: bool | None = None
    laid: tuple[tuple[bool, ...], Any] | None = None
    program: Any = None
    orders: list[Any] = field(default_factory=lambda: [None, None])
    resident: Any = None
    seeds: Any = None


@dataclass(slots=True)
class FusedStep:
    r"""One step of one layer, in the form that all rules share.

    With g the gradient (negated and with coupled weight decay as asked), m the first state (g itself if there is none)
    and v the second:

    .. math::
        u = \frac{m}{c \sqrt v + \epsilon} \text{ (0 where v is 0)}, \quad
        \theta \leftarrow \text{decay_factor} \cdot \theta - \text{lr} \cdot u

    Without a second state u is m, or with Nesterov's momentum :math:`g + \text{nesterov} \cdot m`.

    Args:
        param: rows of the parameter, ``[local_rows, *row_shape]``, contiguous (modified in place).
        grad: ``[k, *row_shape]``, contiguous, the parameter's dtype.
        ids: local row ids, int64 ``[k]``; ``None`` for all rows in order.
        row_offset: global id of local row 0.
        column_offset: of the elements held here within the flattened row.
        second, first, momentum: the states; momentum is SM3's EMA of the update (states modified in place).
        lr, decay_factor, eps, weight_decay: as above; weight_decay is the coupled one.
        correction: c above.
        bound: clamp m to ``bound * sqrt(v)``, see `rules.base.moment_bound`; 0 for no clamp.
        nesterov: factor of Nesterov's momentum; 0 for none.
        maximize: whether to step along the gradient, not against it.
        cache: of the layer's earlier steps; ``None`` if nothing is to be kept.
        leave_out: whether rows of `grad` that are not finite are left out; where both states are element-wise or
            absent (NONE, DENSE, STOCHASTIC, SCALED), elements. A row left out is one that is absent from a sparse
            gradient: nothing of it changes, and it enters no sum and no maximum that it shares with other rows.
        on_device: where the numbers of steps stay on the device, what the step takes from there: then lr,
            decay_factor, eps, correction and weights of states may be 0-d float64 tensors, scales are at
            `KernelState.scale_at`, and seeds of rounding noise are those of step 0.
    """

    param: Tensor
    grad: Tensor
    ids: Tensor | None
    row_offset: int
    column_offset: int
    second: KernelState | None
    first: KernelState | None
    momentum: KernelState | None
    lr: float | Tensor
    decay_factor: float | Tensor = 1.0
    eps: float | Tensor = 0.0
    weight_decay: float = 0.0
    correction: float | Tensor = 1.0
    bound: float = 0.0
    nesterov: float = 0.0
    maximize: bool = False
    cache: StepCache | None = None
    leave_out: bool = False
    on_device: DeviceNumbers | None = None

    @property
    def rows(self) -> int:
        return self.grad.shape[0]

    @property
    def columns(self) -> int:
        """Elements of a row; the gradient has rows."""
        return self.grad.numel() // self.grad.shape[0]

    @property
    def dtype(self) -> DType:
        return _DTYPES[self.param.dtype]

    @property
    def all_rows(self) -> bool:
        """Whether every row of the parameter is in the gradient."""
        return self.ids is None or len(self.ids) == len(self.param)

    @property
    def use_bound(self) -> bool:
        return self.bound != 0

    def tensors(self) -> list[Tensor]:
        """Everything that the step changes but the parameter."""
        stored = [state for state in (self.second, self.first, self.momentum) if state is not None]
        return [t for state in stored for t in (state.data, state.columns, state.scale_at) if t is not None]

    def addresses(self) -> list[int]:
        """Where the parameter and `tensors` are."""
        return [self.param.data_ptr(), *(tensor.data_ptr() for tensor in self.tensors())]


_DTYPES = {torch.float32: DType.FLOAT32, torch.bfloat16: DType.BFLOAT16}
#: dtypes of parameters and gradients that fused kernels take.
DTYPES = tuple(_DTYPES)


def getter(fields: tuple[Field, ...]) -> attrgetter[tuple[Any, ...]]:
    """What asks a `FusedStep` or a `KernelState` for the fields that a step fills, but for addresses, in order."""
    return attrgetter(*(field.name for field in fields if field.source == Source.STEP and not field.is_address))


@dataclass(slots=True)
class Observed:
    """What a gradient adds to sums, before weights.

    Args:
        means: of the squares of its rows, float32 ``[k]``; NaN for a row that is to be left out.
        columns: sums of the squares of its columns, without such rows, float32 ``[columns]``; ``None`` if not wanted.
    """

    means: Tensor
    columns: Tensor | None


def observation(
    param: Tensor,
    grad: Tensor,
    ids: Tensor | None,
    *,
    columns: bool,
    weight_decay: float = 0.0,
    maximize: bool = False,
    leave_out: bool = False,
) -> FusedStep:
    """A step of which only what is `Observed` is wanted: nothing changes.

    Args:
        param, grad, ids, weight_decay, maximize, leave_out: as in `FusedStep`.
        columns: whether sums of columns are wanted, too.
    """
    kind, nothing = Kind.FACTORED if columns else Kind.ROW_SKETCH, torch.empty(0, dtype=torch.float32, device="cpu")
    second = KernelState(kind, nothing, weight=1.0, column_weight=1.0)
    return FusedStep(
        param,
        grad,
        ids,
        0,
        0,
        second,
        None,
        None,
        0.0,
        weight_decay=weight_decay,
        maximize=maximize,
        leave_out=leave_out,
    )


#: Of a step, and of a state.
step_numbers, state_numbers = getter(STEP), getter(STATE)

#: Hash functions of a sketch that fused kernels take.
MOST_DEPTH = 8
#: Elements of a block of quantized states that fused kernels take.
MOST_BLOCK = 1024

#: Where estimates of all rows share sums of squares (`Kind.FACTORED`), a row whose mean of squares is this (1.2e27) or
#: more is left out as if it were not finite: sums that overflow would spoil every row, for good.
MOST_MEAN = 2.0**90
#: Scales below this are multiplied into what they scale. Far from float32's smallest number, so that even tiny second
#: moments keep their full precision, and rare: with beta2 = 0.999 once in 22,000 steps.
MIN_SCALE = 2.0**-32
