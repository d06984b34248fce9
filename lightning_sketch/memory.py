"""Where the bytes of training are: parameters, gradients, optimizer states by codec, and the step's temporaries."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_sketch.codecs import allocate
from lightning_sketch.kernels import describe, fused_kernel
from lightning_sketch.kernels.schema import DTYPES, FusedStep, KernelState
from lightning_sketch.layers.dtensor_states import of_others
from lightning_sketch.layers.record import LayerPart, compute_dtype
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.stock import StockOptimizer
from lightning_sketch.optimizer.stock_layers import most_decoded_bytes
from lightning_sketch.rules import UpdateRule
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import local
from lightning_sketch.sharding.base import rows_at_once
from lightning_sketch.temporaries import bags_of, batch_bytes, live_blocks
from lightning_sketch.text import human_bytes, table

# What a fused step has beside what its kernels ask for: counts of rows, numbers of a step.
_STEP_BYTES = 4096

# Block-sized tensors that are alive at once in the hungriest reference step (Adam over a depth-3 signed sketch: the
# gradient, its square, three gathered rows, their partial medians, the estimate of v, the denominator, the update).
_LIVE_BLOCKS = 12


@dataclass(frozen=True)
class MemoryReport:
    """Bytes held for training by one optimizer; ``str(report)`` is the table.

    Args:
        parameters: bytes of all parameters in the optimizer. Of what is sharded, this rank's part counts, here and
            everywhere below.
        gradients: bytes of the gradients that exist now; a sparse one counts its indices and values.
        state_by_codec: bytes of the states that exist now, by codec name. What ranks share counts on each of them:
            sketches of row scalars and means of columns under row shards, numbers for each row under column shards.
        dense_state: bytes of those layers' states as torch would keep them.
        transient: upper bound of one step's temporaries over compressed layers, bytes; kept layers' temporaries are
            torch's own. On CUDA it includes what dense steps of CountSketch keep from one step to the next: the order
            of a layer's rows by bucket, 4 bytes for each row, each bucket and each hash function.
        conversion_errors: relative error of each state that was encoded from a dense one, by layer and state.
        skipped: in how many steps something of each layer was left out, because its gradient was not finite.
        kernels: what does the steps of compressed layers on the devices of the parameters.
        process: resident memory of this process now, bytes; ``None`` where the system does not say.
        process_peak: its largest value so far, bytes; 0 on Windows.
        cuda_peak: largest memory allocated by torch on the current CUDA device, bytes; 0 without one.
    """

    parameters: int
    gradients: int
    state_by_codec: Mapping[str, int]
    dense_state: int
    transient: int
    conversion_errors: Mapping[str, Mapping[str, float]]
    skipped: Mapping[str, int]
    kernels: str
    process: int | None
    process_peak: int
    cuda_peak: int

    @property
    def state(self) -> int:
        """Bytes of all states."""
        return sum(self.state_by_codec.values())

    def to_dict(self) -> dict[str, int]:
        """The figures for a logger, under ``optimizer_state/...``."""
        figures = {"bytes": self.state, "dense_bytes": self.dense_state, "transient_bytes": self.transient}
        figures |= {f"bytes_{codec}": count for codec, count in self.state_by_codec.items()}
        return {f"optimizer_state/{k}": v for k, v in figures.items()}

    def __str__(self) -> str:
        """Parameters, gradients, states by codec, the step's temporaries, and the whole process."""
        return table("memory of training", ("what", ">bytes", ""), self._rows())

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield "parameters", human_bytes(self.parameters), ""
        yield "gradients", human_bytes(self.gradients), ""
        ratio = f"{self.dense_state / self.state:.1f}x less than dense" if self.state else "none yet"
        yield "optimizer state", human_bytes(self.state), ratio
        for codec, count in sorted(self.state_by_codec.items()):
            yield f"  {codec}", human_bytes(count), ""
        yield "step temporaries, at most", human_bytes(self.transient), "compressed layers"
        yield "kernels", "", self.kernels
        if self.process is not None:
            yield "process", human_bytes(self.process), f"peak {human_bytes(self.process_peak or 0)}"
        if self.cuda_peak:
            yield "CUDA peak", human_bytes(self.cuda_peak), ""
        for fqn, errors in self.conversion_errors.items():
            text = ", ".join(f"{state} {error:.3g}" for state, error in errors.items())
            yield f"conversion error of {fqn}", "", text
        for fqn, left_out in self.skipped.items():
            yield f"steps without rows of {fqn}", "", f"{left_out} (non-finite gradient)"


def report(optimizer: Any) -> MemoryReport:
    """Measure an optimizer, converted or not.

    Args:
        optimizer: a torch optimizer, or a Lightning or Accelerate wrapper around one.

    Raises:
        FloatingPointError: as ``optimizer.step()`` does, for the last one on an accelerator.
    """
    inner = unwrap(optimizer)
    if isinstance(inner, CompressedOptimizer):
        inner.compression.judge_left_out(wait=True)
    by_codec: dict[str, int] = {}
    dense_state = blocks = together = parameters = gradients = hashes = 0
    by_reference: list[tuple[LayerPart, Tensor]] = []
    if isinstance(inner, CompressedOptimizer):
        tensors = inner.all_tensors()
    else:
        tensors = [(param, ()) for group in inner.param_groups for param in group["params"]]
    resident = _resident()
    on_cpu: list[FusedStep] = []
    kinds = sorted({local(param).device.type for param, _ in tensors})
    for param, parts in tensors:
        parameters += 0 if is_lazy(param) else local(param).nbytes
        gradients += _grad_bytes(param.grad)
        state = inner.state.get(param, {})
        if not parts:
            kept = sum(local(v).nbytes for v in state.values() if isinstance(v, Tensor))
            by_codec["Keep"] = by_codec.get("Keep", 0) + kept
            dense_state += kept
            continue
        for part in parts:
            others: dict[str, Any] = {}
            if part.layer.stock_count is not None:
                others = of_others(part.layer, state)
            if state:
                _count_part(part, {k: v for k, v in state.items() if k not in others}, by_codec)
                dense_state += part.rows(param).nbytes * len(part.layer.codecs)
            if part.layer.stock_count is not None:
                kept = sum(local(v).nbytes for k, v in others.items() if isinstance(v, Tensor) and k != "step")
                by_codec["Keep"] = by_codec.get("Keep", 0) + kept
                dense_state += kept
                blocks = max(blocks, _block_bytes(part, param))
                continue
            step = fused_step(inner.rule, part, param) if isinstance(inner, CompressedOptimizer) else None
            if step is not None and param.device.type == "cpu":
                on_cpu.append(step)
            elif step is not None:
                together += _triton_bytes(step)
            else:
                blocks, hashes = max(blocks, _block_bytes(part, param)), max(hashes, _hashes(part)[1])
                by_reference.append((part, local(param)))
            if part.sharing:
                blocks = max(blocks, _block_bytes(part, param))  # what is shared is made of blocks of the gradient
                together += _shared_bytes(part, param)
            together += _copied_bytes(part, param)
        if state:
            by_codec["Keep"] = by_codec.get("Keep", 0) + getattr(state.get("step"), "nbytes", 0)
    together += _cpu_bytes(on_cpu)  # one call steps all layers
    used = ", ".join(describe(torch.device(kind)) for kind in kinds or ["cpu"])
    if isinstance(inner, StockOptimizer):
        together += most_decoded_bytes(inner, inner.steps_apart)
        used = "the optimizer's own step"
    return MemoryReport(
        parameters=parameters,
        gradients=gradients,
        state_by_codec=by_codec,
        dense_state=dense_state,
        transient=max(blocks, batch_bytes(by_reference, hashes)) + together,
        conversion_errors=inner.compression.errors if isinstance(inner, CompressedOptimizer) else {},
        skipped=dict(inner.compression.skipped) if isinstance(inner, CompressedOptimizer) else {},
        kernels=used,
        process=resident,
        process_peak=max(_peak(), resident or 0),  # the system brings the peak up to date now and then only
        cuda_peak=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0,  # type: ignore[no-untyped-call]
    )


def transient_bytes(rule: UpdateRule, part: LayerPart, param: Tensor) -> int:
    """Upper bound of the temporaries of one step of a compressed layer on its own, bytes."""
    step = fused_step(rule, part, param)
    blocks = _block_bytes(part, param) if part.sharing or step is None else 0
    own = 0
    if step is not None:
        own = _cpu_bytes([step]) if param.device.type == "cpu" else _triton_bytes(step)
    return blocks + own + _shared_bytes(part, param) + _copied_bytes(part, param)


def fused_step(rule: UpdateRule, part: LayerPart, param: Tensor) -> FusedStep | None:
    """A step of a layer as kernels are given it, on the meta device and with numbers that mean nothing.

    Args:
        param: its gradient counts, if it has one, and is taken to be contiguous.

    Returns:
        ``None`` if no kernel does it.
    """
    stored = part.layer.persistent_codecs()
    if fused_kernel(param.device) is None or param.dtype not in DTYPES or not rule.fusable(stored):
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


def _block_bytes(part: LayerPart, param: Tensor) -> int:
    """Blocks of `rows_at_once` rows in the reference's step."""
    row, rows = max(1, part.shard.row_numel), part.shard.local_rows
    numel = row * min(rows, rows_at_once(param.device, rows, row, part.layer.most_blocks))
    depth, hashes = _hashes(part)
    blocks = _LIVE_BLOCKS + max(0, depth - 3) if param.device.type == "cpu" else live_blocks(part)
    # On accelerators what is known of rows is made for all of them at once.
    hashed = numel // row if param.device.type == "cpu" else rows
    total = blocks * numel * compute_dtype(param).itemsize + hashed * hashes
    if param.device.type == "cuda":
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
        return 3 * _grad_bytes(grad) + grad._values().shape[0] * hashes
    # Lazy codecs want the touched rows alone: the mask of non-zero elements, and a copy.
    return 2 * rows * row * grad.element_size() + rows * hashes if part.layer.lazy else 0


def _hashes(part: LayerPart) -> tuple[int, int]:
    """Depth of the layer's sketches, and bytes of row ids, buckets and signs for each row."""
    depth = max((getattr(codec, "depth", 0) for codec in part.layer.codecs.values()), default=0)
    return depth, 8 * (4 + 3 * depth)


def _count_part(part: LayerPart, state: Mapping[str, Any], by_codec: dict[str, int]) -> None:
    names = sorted(part.layer.codecs, key=len, reverse=True)  # exp_avg_sq before exp_avg: one is a prefix of the other
    for key, value in state.items():
        owner = next((n for n in names if key.startswith(part.prefix + n)), None)
        if owner is not None and isinstance(value, Tensor):
            codec = type(part.layer.codecs[owner]).__name__
            by_codec[codec] = by_codec.get(codec, 0) + value.nbytes


def _grad_bytes(grad: Tensor | None) -> int:
    if grad is None:
        return 0
    if grad.is_sparse:
        return grad._indices().nbytes + grad._values().nbytes
    return local(grad).nbytes


def _resident() -> int | None:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return None


def _peak() -> int:
    if sys.platform == "win32":
        return 0
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
