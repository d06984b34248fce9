"""What forward and backward hold for a batch, before anything is allocated: run on fake tensors."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from lightning_sketch.layers.temporaries import grad_bytes

#: Named or positional inputs of a model, or what computes its loss.
Batch = Mapping[str, Any] | Sequence[Any] | Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class BatchBytes:
    """What there is beside parameters and buffers at the moment when forward and backward hold most, bytes.

    Args:
        activations: what backward needs, temporaries of both passes, and the batch itself.
        gradients: those of parameters that are complete by then.
    """

    activations: int
    gradients: int


def batch_memory(model: nn.Module, batch: Batch) -> BatchBytes:
    """Count what one batch takes in forward and backward, on fake tensors: nothing is allocated, and nothing computed.

    The model is copied without its tensors, and left as it is. Counted is what torch allocates on the CPU; kernels of
    an accelerator may keep and allocate other things.

    Args:
        model: on any device, the meta device included; in the mode, training or not, that it is in.
        batch: as `estimate_memory` takes it.

    Raises:
        ValueError: the model cannot be run so, as where it looks at the values of tensors. The error of the run is its
            cause.
    """
    # Here: slow to import.
    from torch._subclasses.fake_tensor import FakeTensorMode

    # What a model has made elsewhere, such as a mask in a closure, is taken for fake, too.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it writes a traceback before some errors are raised
    disabled, log.disabled = log.disabled, True
    try:
        with mode:
            fakes = {id(tensor): _fake(tensor) for tensor in _tensors(model)}
        copied = copy.deepcopy(model, fakes)  # which takes the fakes in their places, a tied one in all of its own
        with mode:
            return track(copied, lambda: _loss(copied, batch))
    except Exception as error:  # whatever a model raises on tensors without values
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"activations cannot be counted: the model does not run on fake tensors, which have shapes and no values "
            f"({reason}). Leave the batch out, try another dtype, or give a callable that computes the loss without "
            "looking at values"
        ) from error
    finally:
        log.disabled = disabled


def track(model: nn.Module, compute_loss: Callable[[], Tensor]) -> BatchBytes:
    """Run forward and backward, and count what there is at the moment when there is most.

    Args:
        model: whose parameters have no gradients yet.
        compute_loss: runs it; what it returns goes backward.
    """
    counter = _Counter([*model.parameters(), *model.buffers()])
    trained = [param for param in model.parameters() if param.requires_grad]
    hooks = [x.register_post_accumulate_grad_hook(counter.complete) for x in trained]  # type: ignore[no-untyped-call]
    try:
        with counter:
            compute_loss().backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return counter.most


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all memory that operations return, as long as it is alive.

    torch's own ``MemTracker`` does the same, by module, but registers hooks on frozen parameters, which raises.

    Args:
        known: what is there already, and is not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = BatchBytes(0, 0)
        self._held = 0
        self._gradients: dict[Tensor, int] = {}  # by parameter
        self._alive = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def complete(self, param: Tensor) -> None:
        """Note that a parameter has its gradient."""
        self._gradients[param] = grad_bytes(param.grad)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, found)
        if self._held > self.most.activations + self.most.gradients:
            gradients = sum(self._gradients.values())
            self.most = BatchBytes(self._held - gradients, gradients)
        return found

    def _count(self, tensor: Tensor) -> None:
        if tensor.is_sparse:
            for part in (tensor._indices(), tensor._values()):
                self._count(part)
            return
        storage = tensor.untyped_storage()
        if storage not in self._alive:
            size = storage.nbytes()
            self._held += size
            # Called when the memory is given back: torch keeps one object for it as long as any tensor has it.
            self._alive[storage] = weakref.ref(storage, lambda _: self._free(size))

    def _free(self, size: int) -> None:
        self._held -= size


def _tensors(model: nn.Module) -> list[Tensor]:
    """All tensors of a model, those among its modules' plain attributes included."""
    plain = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    return [*model.parameters(), *model.buffers(), *plain]


def _fake(tensor: Tensor) -> Tensor:
    """Under a fake mode: a tensor like it on the CPU."""
    fake = torch.empty_like(tensor, device="cpu", requires_grad=False)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    if callable(batch):
        return batch(model)
    inputs: Any = tree_map_only(Tensor, _fake, batch)
    found = model(**inputs) if isinstance(batch, Mapping) else model(*inputs)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise TypeError(f"the model returned a {type(found).__name__} without a loss: give a callable that returns it")
    return loss.sum()
