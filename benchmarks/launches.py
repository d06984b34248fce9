"""How many kernels a step launches on an accelerator, how often it waits for the device, and what it allocates.

    python -m benchmarks.launches

No accelerator is needed: tensors are fake (`torch._subclasses.FakeTensorMode`), and a dispatch mode counts the
operators that would be launched. An accumulating ``index_put_`` is several kernels on CUDA (it sorts) and counted so.
Triton's kernels are counted where they would be launched; fake tensors get addresses for that.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lightning_sketch as ls
from lightning_sketch import Policy, Rule, compress, report
from lightning_sketch.kernels import native

LARGE = (128_256, 4_096)  # Llama 3's table
SMALL, LAYERS = (1_024, 256), 200

#: Kernels of operators that are more than one, by torch's CUDA source. An accumulating index_put_ makes linear indices
#: (3), sorts pairs by radix (a histogram, a scan, four digits of 8 bits), and adds.
KERNELS = {"aten::index_put_": 10, "aten::sort": 7, "aten::_unique2": 12, "aten::nonzero": 3}
#: Of operators on lists of tensors: how many tensors, and how many chunks of 65,536 elements, one launch takes
#: (`MultiTensorApply.cuh`, for two lists); how many tensors `cat` and `stack` copy in one.
LISTED, CHUNKS, CHUNK, JOINED = 64, 320, 1 << 16, 128
#: Operators that launch nothing: they make views, or memory that nobody writes.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "lift_fresh")


@dataclass
class Counts:
    """What a step asks of the device.

    Args:
        launches: kernels.
        waits: how often the host waits for a number.
        temporaries: the most bytes of tensors on the device beside those that were there before.
        operators: launches by operator, and by kernel of Triton under ``triton::`` and its name.
        copies: between the host and the device, either way.
    """

    launches: int
    waits: int
    temporaries: int
    operators: dict[str, int]
    copies: int = 0

    @property
    def kernels(self) -> int:
        """Launches of Triton's kernels."""
        return sum(count for name, count in self.operators.items() if name.startswith("triton::"))


class CountLaunches(TorchDispatchMode):
    """Runs what concerns a device on fake tensors, and counts it; what concerns the CPU runs as it is.

    A number that the host asks for is 1: sums are finite, and masks true.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = torch.device(device)
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.reset()

    def reset(self) -> None:
        """Count anew. Tensors that exist now are no temporaries."""
        self.launches = self.waits = self.temporaries = self.copies = 0
        self.operators: dict[str, int] = {}
        self._live.clear()

    def counts(self) -> Counts:
        """Since the last `reset`."""
        return Counts(self.launches, self.waits, self.temporaries, dict(self.operators), self.copies)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fake tensor on the device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        made_there = "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == self.device.type
        if not made_there and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            return True if args[0].dtype is torch.bool else 1
        inputs = {x.untyped_storage()._cdata for x in given}
        found = func(*args, **kwargs)  # the fake mode below does it
        self._count(func, args, given, found, inputs)
        return found

    def _count(self, func: Any, args: tuple[Any, ...], given: list[Tensor], found: Any, inputs: set[int]) -> None:
        made = [x for x in tree_flatten(found)[0] if isinstance(x, FakeTensor)]
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_") and len({x.device.type for x in (*given, *made)}) > 1:
            self.copies += 1
        elif name.startswith("aten::") and not (func.is_view or name.removeprefix("aten::") in FREE):
            kernels = KERNELS.get(name, 1) if name not in ("aten::cat", "aten::stack") else -(-len(given) // JOINED)
            if name.startswith("aten::_foreach_"):
                chunks = sum(-(-x.numel() // CHUNK) for x in args[0])
                kernels = max(-(-len(args[0]) // LISTED), -(-chunks // CHUNKS))
            self.launches += kernels
            self.operators[name] = self.operators.get(name, 0) + kernels
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        del made, found
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.temporaries = max(self.temporaries, sum(size for _, size in self._live.values()))


#: What asks for a number, and what it is to return.
_READING: dict[Any, type] = {Tensor.__int__: int, Tensor.__bool__: bool, Tensor.__float__: float}


class IndexByOperators(TorchFunctionMode):
    """Does by operators what in torch's CPU build asks for the device when Python calls it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not (args and (isinstance(args[0], FakeTensor) or _is_batched(args[0]))):
            return func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            return _indexed(*args)
        if func is Tensor.data_ptr:
            return _address(args[0])
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if func in _READING:
            return _READING[func](torch.ops.aten._local_scalar_dense(*args))
        if func is Tensor.__setitem__:
            target, index, value = args
            if isinstance(index, Tensor):
                return target.index_put_((index,), value)
            return torch.ops.aten.copy_(_indexed(target, index), value)
        return func(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    """An address as Triton's launches read it, of memory that is not there: aligned, and another for every tensor."""
    return (tensor.untyped_storage()._cdata << 8) + tensor.storage_offset() * tensor.element_size()


def _is_batched(x: Any) -> bool:
    """Whether it is fake tensors of several layers, over which ``torch.vmap`` runs."""
    return isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x)


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    dim = 0
    for each in index if isinstance(index, tuple) else (index,):
        if each is Ellipsis:
            dim = tensor.ndim - 1  # as used here: one more index follows
        elif each is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(each, int):
            tensor = tensor.select(dim, each)
        elif isinstance(each, slice):
            tensor, dim = torch.ops.aten.slice(tensor, dim, each.start, each.stop, each.step or 1), dim + 1
        else:
            tensor = torch.ops.aten.index(tensor, [None] * dim + [each])
            dim += 1
    return tensor


@contextmanager
def counting(device: str = "cuda", *, triton: bool = False) -> Iterator[CountLaunches]:
    """Tensors on a device are fake within, and what steps launch on it is counted.

    Args:
        triton: whether Triton's kernels make the steps, which are then counted and not launched; else plain PyTorch.
    """
    # The fake mode is entered for itself: while it is, torch does not look for a device to initialise.
    with (
        mock.patch.dict(os.environ, {native.VARIABLE: "" if triton else "reference"}),
        _launches_counted() if triton else nullcontext(),
        mock.patch("lightning_sketch.sharding.fake.readable", True),
        FakeTensorMode(allow_non_fake_inputs=True),  # vmap makes tensors of numbers
        IndexByOperators(),
        CountLaunches(device) as mode,
    ):
        if triton:
            _counter.append(mode)
        yield mode


#: What counts launches of Triton's kernels.
_counter: list[CountLaunches] = []


@contextmanager
def _launches_counted() -> Iterator[None]:
    """Kernels of Triton are counted where they would be launched, and taken for proved."""
    from triton.runtime import JITFunction

    def chosen(kernel: Any, grid: Any) -> Callable[..., None]:
        def launched(*args: Any, **kwargs: Any) -> None:
            name = f"triton::{kernel.__name__}"
            _counter[-1].launches += 1
            _counter[-1].operators[name] = _counter[-1].operators.get(name, 0) + 1

        return launched

    with (
        mock.patch.object(JITFunction, "__getitem__", chosen),
        mock.patch("lightning_sketch.optimizer.step.proved", return_value=True),
        mock.patch("torch.cuda.device", return_value=nullcontext()),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
    ):
        try:
            yield
        finally:
            _counter.clear()


def count_step(
    shapes: list[tuple[int, int]],
    policy: Policy | None,
    *,
    make: Callable[..., Any] = torch.optim.AdamW,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    triton: bool = False,
    **options: Any,
) -> tuple[Counts, int]:
    """Count the second step of tables of these shapes, with dense gradients.

    Args:
        policy: as in `compress`.
        make: the optimizer's class.
        triton: as in `counting`.
        options: of `compress`.

    Returns:
        what it asks of the device, and the bound of its temporaries that `report` gives.
    """
    with counting(device, triton=triton) as mode:
        model = nn.ModuleList(nn.Embedding(1, 1) for _ in shapes)
        for module, shape in zip(model, shapes, strict=True):
            module.weight = nn.Parameter(mode.tensor(*shape, dtype=dtype))
        optimizer = make(model.parameters(), lr=1e-3)
        optimizer = compress(optimizer, model, policy, **options)
        for param in model.parameters():
            param.grad = mode.tensor(*param.shape, dtype=dtype)
        optimizer.step()  # allocates the states
        mode.reset()
        optimizer.step()
        return mode.counts(), report(optimizer).transient


#: Codecs of both moments, by name.
CODECS: dict[str, dict[str, Any]] = {
    "Drop + RowWise(10)": {"first_moment": ls.Drop(), "second_moment": ls.RowWise(compression=10)},
    "Drop + Factored": {"first_moment": ls.Drop(), "second_moment": ls.Factored()},
    "Drop + RowWise": {"first_moment": ls.Drop(), "second_moment": ls.RowWise()},
    "Drop + SM3": {"first_moment": ls.Drop(), "second_moment": ls.SM3()},
    "BFloat16 + Factored": {"first_moment": ls.BFloat16(), "second_moment": ls.Factored()},
    "BFloat16, both": {"first_moment": ls.BFloat16(), "second_moment": ls.BFloat16()},
    "CountSketch, both": {"first_moment": ls.CountSketch(), "second_moment": ls.CountSketch()},
    "Quantized, both": {"first_moment": ls.Quantized(), "second_moment": ls.Quantized()},
    "Quantized + Factored": {"first_moment": ls.Quantized(), "second_moment": ls.Factored()},
}


def policies() -> dict[str, Policy | None]:
    """What is counted, by name; ``None`` is the default policy."""
    found = {name: Policy([Rule(role="embedding", **chosen)]) for name, chosen in CODECS.items()}
    return {"default": None} | found


def main() -> None:
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)  # it warns about first moments that it drops
    print("AdamW on CUDA, dense float32 gradients, nonfinite='raise'; of the second step")
    print("| tables | policy | by | launches | of kernels | copies | waits | largest temporaries | their bound |")
    print("|---" * 9 + "|")
    for words, shapes in ((f"one {LARGE}", [LARGE]), (f"{LAYERS} of {SMALL}", [SMALL] * LAYERS)):
        for name, policy in policies().items():
            if policy is None and shapes[0] is SMALL:
                continue  # it keeps small tables
            for triton in (False, True) if importlib.util.find_spec("triton") else (False,):
                counts, bound = count_step(shapes, policy, triton=triton)
                by = "Triton" if triton else "plain PyTorch"
                found = f"{by} | {counts.launches:,} | {counts.kernels} | {counts.copies} | {counts.waits}"
                sizes = f"{counts.temporaries / 2**20:,.1f} MiB | {bound / 2**20:,.1f} MiB"
                print(f"| {words} | {name} | {found} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
