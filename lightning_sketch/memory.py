"""Where the bytes of training are: parameters, gradients, optimizer states by codec, and the step's temporaries."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_sketch.kernels import describe
from lightning_sketch.layers.dtensor_states import of_others
from lightning_sketch.layers.record import LayerPart
from lightning_sketch.layers.temporaries import Temporaries, grad_bytes
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.stock import StockOptimizer
from lightning_sketch.optimizer.stock_layers import most_decoded_bytes
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import is_dtensor, local
from lightning_sketch.text import human_bytes, state_rows, table


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
        yield from state_rows(self.state_by_codec, self.dense_state, "dense")
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
    by_codec: Counter[str] = Counter()
    dense_state = parameters = gradients = 0
    temporaries = Temporaries()
    if isinstance(inner, CompressedOptimizer):
        tensors = inner.all_tensors()
    else:
        tensors = [(param, ()) for group in inner.param_groups for param in group["params"]]
    resident = _resident()
    kinds = sorted({local(param).device.type for param, _ in tensors})
    for param, parts in tensors:
        parameters += 0 if is_lazy(param) else local(param).nbytes
        gradients += grad_bytes(param.grad)
        state = inner.state.get(param, {})
        if not parts:
            kept = sum(map(_nbytes, state.values()))
            by_codec["Keep"] += kept
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
                kept = sum(_nbytes(v) for k, v in others.items() if k != "step")
                by_codec["Keep"] += kept
                dense_state += kept
                temporaries.add_blocks(part, param, param.device)
            elif isinstance(inner, CompressedOptimizer):
                temporaries.add(inner.rule, part, param, param.device)
        if state:
            by_codec["Keep"] += getattr(state.get("step"), "nbytes", 0)
    transient = temporaries.bytes()
    used = ", ".join(describe(torch.device(kind)) for kind in kinds or ["cpu"])
    if isinstance(inner, StockOptimizer):
        transient += most_decoded_bytes(inner, inner.steps_apart)
        used = "the optimizer's own step"
    return MemoryReport(
        parameters=parameters,
        gradients=gradients,
        state_by_codec=dict(by_codec),
        dense_state=dense_state,
        transient=transient,
        conversion_errors=inner.compression.errors if isinstance(inner, CompressedOptimizer) else {},
        skipped=dict(inner.compression.skipped) if isinstance(inner, CompressedOptimizer) else {},
        kernels=used,
        process=resident,
        process_peak=max(_peak(), resident or 0),  # the system brings the peak up to date now and then only
        cuda_peak=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0,  # type: ignore[no-untyped-call]
    )


def _count_part(part: LayerPart, state: Mapping[str, Any], by_codec: Counter[str]) -> None:
    names = sorted(part.layer.codecs, key=len, reverse=True)  # exp_avg_sq before exp_avg: one is a prefix of the other
    for key, value in state.items():
        owner = next((n for n in names if key.startswith(part.prefix + n)), None)
        if owner is not None and isinstance(value, Tensor):
            by_codec[type(part.layer.codecs[owner]).__name__] += value.nbytes


def _nbytes(value: Any) -> int:
    """Bytes here of what an optimizer keeps: a tensor, one that is made of others (torchao's), or a list of such."""
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value))
    if not isinstance(value, Tensor):
        return 0
    if not is_dtensor(value) and hasattr(value, "__tensor_flatten__"):
        return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    held = local(value)
    return held.nbytes if held is value else _nbytes(held)


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
