"""What a step of compressed layers allocates for itself, from shapes and codecs alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sketch.codecs import allocate
from lightning_sketch.kernels import fused_kernel
from lightning_sketch.kernels.bags import bags_bytes
from lightning_sketch.kernels.schema import DTYPES, FusedStep, KernelState
from lightning_sketch.layers.record import LayerPart, compute_dtype
from lightning_sketch.rules import UpdateRule, alike
from lightning_sketch.sharding import local
from lightning_sketch.sharding.base import rows_at_once

# What a fused step has beside what its kernels ask for: counts of rows, numbers of a step.
_STEP_BYTES = 4096

# Block-sized tensors that are alive at once in the hungriest reference step (Adam over a depth-3 signed sketch: the
# gradient, its square, three gathered rows, their partial medians, the estimate of v, the denominator, the update).
_LIVE_BLOCKS = 12


class Temporaries:
    """Upper bound of what one step allocates, made layer by layer."""

    def __init__(self) -> None:
        self._blocks = self._hashes = self._together = 0
        self._on_cpu: list[FusedStep] = []
        self._by_reference: list[tuple[LayerPart, Tensor, torch.device]] = []

    def add(self, rule: UpdateRule, part: LayerPart, param: Tensor, device: torch.device) -> None:
        """A layer that `rule` steps.

        Args:
            param: a meta tensor of its shape and dtype will do.
            device: where it is to be stepped.
        """
        step = fused_step(rule, part, param, device)
        if step is not None and device.type == "cpu":
            self._on_cpu.append(step)
        elif step is not None:
            self._together += _triton_bytes(step)
        else:
            self.add_blocks(part, param, device)
            self._hashes = max(self._hashes, _hashes(part)[1])
            self._by_reference.append((part, local(param), device))
        if part.sharing:
            self.add_blocks(part, param, device)  # what is shared is made of blocks of the gradient
            self._together += _shared_bytes(part, param)
        self._together += _copied_bytes(part, param)

    def add_blocks(self, part: LayerPart, param: Tensor, device: torch.device) -> None:
        """A layer of which one block after the other is decoded."""
        self._blocks = max(self._blocks, _block_bytes(part, param, device))

    def bytes(self) -> int:
        """Of all layers."""
        # One call steps all layers on the CPU.
        blocks = max(self._blocks, batch_bytes(self._by_reference, self._hashes))
        return blocks + self._together + _cpu_bytes(self._on_cpu)


def transient_bytes(rule: UpdateRule, part: LayerPart, param: Tensor) -> int:
    """Upper bound of the temporaries of one step of a compressed layer on its own, bytes."""
    found = Temporaries()
    found.add(rule, part, param, param.device)
    return found.bytes()


def fused_step(rule: UpdateRule, part: LayerPart, param: Tensor, device: torch.device) -> FusedStep | None:
    """A step of a layer as kernels are given it, on the meta device and with numbers that mean nothing.

    Args:
        param: its gradient counts, if it has one, and is taken to be contiguous.
        device: where it is to be stepped.

    Returns:
        ``None`` if no kernel does it.
    """
    stored = part.layer.persistent_codecs()
    if fused_kernel(device) is None or param.dtype not in DTYPES or not rule.fusable(stored):
        return None
    states: dict[bool, KernelState] = {}
    momentum: KernelState | None = None
    for name, codec in stored.items():
        spec = replace(part.spec(name, param, {}), device=torch.device("meta"))
        tensors = allocate(codec, spec)
        bound = [codec.bind(spec, tensors), *([codec.bind_momentum(spec, tensors)] if codec.momentum else [])]
        kernel_states = []
        for state in bound:
            if state is None or not state.fusable():
                return None
            state.begin(decay=1.0, weight=1.0, step=1, rows=None)
            kernel_states.append(state.to_kernel())
        states[part.layer.signed[name]] = kernel_states[0]
        momentum = kernel_states[1] if codec.momentum else momentum
    shape, sparse = part.rows(param).shape, param.grad is not None and param.grad.is_sparse
    present = min(shape[0], param.grad._values().shape[0]) if param.grad is not None and sparse else shape[0]
    return FusedStep(
        param=torch.empty(shape, dtype=param.dtype, device="meta"),
        grad=torch.empty((present, *shape[1:]), dtype=param.dtype, device="meta"),
        ids=torch.empty(present, dtype=torch.int64, device="meta") if sparse or part.layer.lazy else None,
        row_offset=0,
        column_offset=0,
        second=states.get(False),
        first=states.get(True),
        momentum=momentum,
        lr=0.0,
        leave_out=True,
    )


def live_blocks(part: LayerPart) -> int:
    """Block-sized tensors that are alive at once in a step by the reference."""
    codecs = part.layer.codecs.values()
    depth = max((getattr(codec, "depth", 0) for codec in codecs), default=0)
    return max(codec.live_blocks for codec in codecs) + max(0, depth - 3)


def bags_of(part: LayerPart, param: Tensor, blocks: int) -> int:
    """Of sketches on a CUDA device: rows sorted by bucket, and a block's sums, as large as the table."""
    shapes = {shape for codec in part.layer.persistent_codecs().values() if (shape := codec.table_shape(part.shard))}
    itemsize, rows = compute_dtype(param).itemsize, part.shard.local_rows
    hashed = [(depth, width) for depth, width in shapes if width < part.shard.table_rows]  # others are exact
    sorting = sum(bags_bytes(rows, depth, width, blocks, itemsize) for depth, width in hashed)
    return sorting + max((depth * width * part.shard.row_numel * itemsize for depth, width in hashed), default=0)


def batch_bytes(layers: Iterable[tuple[LayerPart, Tensor, torch.device]], hashes: int) -> int:
    """Of layers by the reference: what the largest batch of those that are alike takes, 0 if none is.

    Args:
        hashes: bytes of row ids, buckets and signs for each row, at most.
    """
    batches: dict[Hashable, list[tuple[LayerPart, Tensor]]] = {}
    for part, param, device in layers:
        numel = part.shard.local_rows * part.shard.row_numel
        together = all(codec.steps_together and not codec.lazy for codec in part.layer.codecs.values())
        if numel and together and alike.pays(device) and alike.most_together(numel) > 1:
            kind = param.dtype, device, part.shard, tuple(part.layer.codecs.items())
            batches.setdefault(kind, []).append((part, param))
    largest = 0
    for members in batches.values():
        part, param = members[0]
        rows, numel = part.shard.local_rows, part.shard.local_rows * part.shard.row_numel
        count = alike.evenly(len(members), alike.most_together(numel))
        if len(members) > 1:
            states = sum(
                codec.nbytes(part.spec(state, param, {})) for state, codec in part.layer.persistent_codecs().items()
            )
            stacked = 2 * numel * param.element_size() + states
            arithmetic = live_blocks(part) * numel * compute_dtype(param).itemsize + rows * hashes
            largest = max(largest, count * (stacked + arithmetic))
    return largest


def _cpu_bytes(steps: Sequence[FusedStep]) -> int:
    """Memory that the compiled kernels ask for, in a step of these layers."""
    if not steps:
        return 0
    from lightning_sketch.kernels import cpu  # defines torch operators

    return cpu.scratch_bytes(steps) + _STEP_BYTES


def _triton_bytes(step: FusedStep) -> int:
    """Memory that Triton's kernels ask for, orders of rows by bucket that dense steps keep among it."""
    from lightning_sketch.kernels.triton.scratch import step_bytes  # imports Triton

    return step_bytes(step)


def _block_bytes(part: LayerPart, param: Tensor, device: torch.device) -> int:
    """Blocks of `rows_at_once` rows in the reference's step."""
    row, rows = max(1, part.shard.row_numel), part.shard.local_rows
    numel = row * min(rows, rows_at_once(device, rows, row, part.layer.most_blocks))
    depth, hashes = _hashes(part)
    blocks = _LIVE_BLOCKS + max(0, depth - 3) if device.type == "cpu" else live_blocks(part)
    # On accelerators what is known of rows is made for all of them at once.
    hashed = numel // row if device.type == "cpu" else rows
    total = blocks * numel * compute_dtype(param).itemsize + hashed * hashes
    if device.type == "cuda":
        total += bags_of(part, param, -(-rows * row // numel))
    if param.grad is not None and param.grad.is_sparse:
        total += param.grad._values().shape[0] * hashes
    return total


def _shared_bytes(part: LayerPart, param: Tensor) -> int:
    """The buffer in which ranks agree, and what a rank keeps of its own rows and columns until they have."""
    numbers = sum((s.rows * part.shard.local_rows + s.whole) * (1 + s.lazy) for s in part.sharing.values())
    own = part.shard.local_rows + part.shard.row_numel if part.sharing else 0
    return compute_dtype(param).itemsize * (2 * numbers + own)


def _copied_bytes(part: LayerPart, param: Tensor) -> int:
    """What is made of a gradient before the step: a sparse one coalesced, the touched rows of a dense one."""
    grad = param.grad
    if grad is None:
        return 0
    rows, row = part.shard.local_rows, max(1, part.shard.row_numel)
    hashes = 2 * _hashes(part)[1] if part.layer.lazy else 0  # of the rows that decay
    if grad.is_sparse:
        return 3 * grad_bytes(grad) + grad._values().shape[0] * hashes
    # Lazy codecs want the touched rows alone: the mask of non-zero elements, and a copy.
    return 2 * rows * row * grad.element_size() + rows * hashes if part.layer.lazy else 0


def _hashes(part: LayerPart) -> tuple[int, int]:
    """Depth of the layer's sketches, and bytes of row ids, buckets and signs for each row."""
    depth = max((getattr(codec, "depth", 0) for codec in part.layer.codecs.values()), default=0)
    return depth, 8 * (4 + 3 * depth)


def grad_bytes(grad: Tensor | None) -> int:
    """Bytes of a gradient; of a sparse one, of indices and values."""
    if grad is None:
        return 0
    if grad.is_sparse:
        return grad._indices().nbytes + grad._values().nbytes
    return local(grad).nbytes
