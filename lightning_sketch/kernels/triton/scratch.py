"""What steps by these kernels allocate on the device, beside a gradient and states."""

from __future__ import annotations

from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.kernels.triton import orders
from lightning_sketch.kernels.triton.layout import lay_out
from lightning_sketch.kernels.triton.table import COUNT

#: Beside its words in the table: what it left out, and where numbers stay on the device its words again and what they
#: are made of.
_LAYER = 8 + 8 * COUNT + 1024


def step_bytes(step: FusedStep) -> int:
    """What one layer's step allocates, orders of rows by bucket among it that dense steps keep.

    Args:
        step: tensors on the meta device will do.
    """
    if not step.grad.numel():
        return _LAYER
    laid = lay_out(step, aligned=False)
    total = _LAYER + 8 * COUNT + 4 * sum(laid.floats) + 8 * (laid.sums + (laid.exponents + 3) // 2)
    sketches = [state for state in (step.second, step.first) if state is not None and state.kind == Kind.SKETCH]
    shapes = [(state.depth, state.width) for state in sketches]
    rows = step.grad.shape[0]
    total += orders.kept_bytes(rows, shapes) + orders.sorting_bytes(rows, shapes)
    if step.ids is not None:  # by row: the end of each one's bucket, and keys
        total += sum(8 * depth * rows for depth, _ in shapes)
    return total
