"""Step compressed layers in backward, each as soon as its gradient is complete, and free the gradient.

So no two of their gradients need exist at once. Such a step is the one that ``optimizer.step()`` would make: the same
bits, under the hyperparameters that the layer's group has at that time. ``optimizer.step()`` then steps the other
layers, and compressed ones that have no hook yet: of a parameter that was replaced, unfrozen, or copied.

It is the ordinary training where nothing happens to a gradient between backward and ``optimizer.step()``, and every
layer has one gradient a step. What can be seen of anything else raises:

- a second gradient of a layer before ``optimizer.step()`` (accumulation, closures that are evaluated several times,
  SAM, a backward pass whose gradients are thrown away), before it changes the layer;
- gradients of uncompressed layers that were scaled after backward (clipping by the norm of all gradients, a
  ``GradScaler``, averaging by hand), by a sample of one of them, before ``optimizer.step()`` changes anything;
- DistributedDataParallel and DeepSpeed, which average gradients after they are complete, at the first gradient.

>>> import torch
>>> from lightning_sketch import Policy, Rule, compress
>>> model = torch.nn.Embedding(30_000, 16)
>>> policy = Policy([Rule(role="embedding", exp_avg="Drop", exp_avg_sq="Factored")])
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
>>> optimizer = compress(optimizer, model, policy, step_in_backward=True)
>>> model(torch.tensor([7, 8])).sum().backward()
>>> model.weight.grad is None, int(optimizer.state[model.weight]["step"])
(True, 1)
>>> optimizer.step()  # after every backward(): it steps all other layers
>>> int(optimizer.state[model.weight]["step"])
1
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of Dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sketch.kernels.capture import capturing
from lightning_sketch.layers.record import RECORDS, LayerRecord, part_of
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.optimizer.nonfinite import Counted
from lightning_sketch.optimizer.step import step_alone
from lightning_sketch.policy.plan import Plan
from lightning_sketch.sharding import local
from lightning_sketch.sharding.agree import joined
from lightning_sketch.sharding.fake import is_fake

#: Numbers of a gradient that a sample has at most.
SAMPLE = 1024

#: Modules around a model that average its gradients after they are complete, by class name.
_AVERAGING = ("DistributedDataParallel", "DeepSpeedEngine")


class InBackward:
    """The hooks of one optimizer's layers, and what they did since its last step. Neither copied nor pickled."""

    def __init__(self, optimizer: CompressedGroups) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._places: dict[int, tuple[dict[str, Any], int]] = {}  # group and position, by the id of a parameter
        self._hooks: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._sample: _Sample | None = None
        self._stepped: dict[int, tuple[Tensor, str]] = {}  # and its name
        self._left_out: list[Counted] = []
        self._engines_checked = self._meets_scalers = False
        self._lock = threading.Lock()  # every device has a thread of its own in backward

    @property
    def any_stepped(self) -> bool:
        """Whether a layer was stepped in backward since the last ``optimizer.step()``."""
        return bool(self._stepped)

    @_disable_dynamo
    def attach(self) -> None:
        """Have hooks for the layers that the optimizer has now, and for no others."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        places: dict[int, tuple[dict[str, Any], int]] = {}
        kept: list[Tensor] = []
        for group in optimizer.param_groups:
            if RECORDS not in group or optimizer.is_flat(group):
                continue
            for index, (param, record) in enumerate(zip(group["params"], group[RECORDS], strict=False)):
                if record is None:
                    kept.append(param)
                elif id(param) in self._hooks or (param.requires_grad and _steps_alone(record, param)):
                    places[id(param)] = group, index
        self._places = places
        for key in self._hooks.keys() - places.keys():
            self._hooks.pop(key)[1].remove()
        for key in places.keys() - self._hooks.keys():
            group, index = places[key]
            self._hooks[key] = group["params"][index], _register(group["params"][index], self._on_gradient)
            self._engines_checked = False
        if not places:
            kept = []
        if self._sample is None or all(param is not self._sample.param for param in kept):
            if self._sample is not None:
                self._sample.handle.remove()
            self._sample = _Sample.of_smallest(kept)
        self._meet_scalers(optimizer, bool(places))

    def detach(self) -> None:
        """Remove all hooks."""
        if (optimizer := self._optimizer()) is not None:
            self._meet_scalers(optimizer, False)
        for _, handle in self._hooks.values():
            handle.remove()
        if self._sample is not None:
            self._sample.handle.remove()
        self._hooks, self._places, self._sample = {}, {}, None

    def forget(self) -> None:
        """Forget what was stepped: the states of before are back."""
        self._stepped, self._left_out = {}, []
        if self._sample is not None:
            self._sample.forget()

    @_disable_dynamo
    def check(self) -> None:
        """Raise if ``optimizer.step()`` would not make what the hooks began a step of all layers.

        Raises:
            RuntimeError: a layer that was stepped in backward has another gradient since; a gradient scaler left
                unscaling to the step; or gradients were scaled after backward.
        """
        if (optimizer := self._optimizer()) is None:
            return
        _refuse_scaler(optimizer, _some_names(fqn for _, fqn in self._stepped.values()))
        for param, fqn in self._stepped.values():
            if param.grad is not None:
                raise RuntimeError(_SECOND.format(fqn))
        if self._stepped and self._sample is not None and self._sample.changed():
            raise RuntimeError(_SCALED.format(_some_names(fqn for _, fqn in self._stepped.values())))

    @_disable_dynamo
    def finish(self, counted: Counted | None) -> Counted | None:
        """Begin anew, after a step of all layers.

        Args:
            counted: what the layers that ``optimizer.step()`` stepped left out.

        Returns:
            what all layers left out.
        """
        every = [*self._left_out, *([] if counted is None else [counted])]
        self.forget()
        self.attach()
        if len(every) < 2:
            return every[0] if every else None
        devices = [one.counts.device for one in every]
        device = next((found for found in devices if found.type != "cpu"), devices[0])
        counts = torch.cat([one.counts.to(device, non_blocking=True) for one in every])
        units = [unit for one in every for unit in one.units]
        return Counted(counts, units, any(one.capturable for one in every))

    @_disable_dynamo
    def _on_gradient(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        with self._lock, torch.no_grad():
            self._step(optimizer, param)

    def _step(self, optimizer: CompressedGroups, param: Tensor) -> None:
        """Step a layer and free its gradient.

        Raises:
            RuntimeError: it was stepped in an earlier backward pass, or may not be stepped in this one. Nothing of it
                was changed.
        """
        group, record = self._find(optimizer, param)
        if record is None:
            return
        part = optimizer.compression.bindings.part(record, param)
        fqn = part.layer.fqn
        if id(param) in self._stepped:
            raise RuntimeError(_SECOND.format(fqn))
        _refuse_scaler(optimizer, fqn)
        self._refuse_averaging(fqn)
        counted = step_alone(optimizer, group, param, (part,))
        param.grad = None
        self._stepped[id(param)] = param, fqn
        if counted is not None:
            self._left_out.append(counted)

    def _find(self, optimizer: CompressedGroups, param: Tensor) -> tuple[dict[str, Any], str | None]:
        """A parameter's group and record; none if something moved it, and ``optimizer.step()`` is to find where."""
        group, index = self._places[id(param)]
        params, records = group["params"], group.get(RECORDS, ())
        here = any(group is own for own in optimizer.param_groups) and index < min(len(params), len(records))
        return group, records[index] if here and params[index] is param else None

    def _meet_scalers(self, optimizer: Optimizer, meet: bool) -> None:
        """Have GradScalers leave unscaling to the optimizer, or no longer: so they show themselves, and are refused."""
        if meet:
            vars(optimizer)["_step_supports_amp_scaling"] = self._meets_scalers = True
        elif self._meets_scalers:
            vars(optimizer).pop("_step_supports_amp_scaling", None)
            self._meets_scalers = False

    def _refuse_averaging(self, fqn: str) -> None:
        """Look, once, for what averages gradients after they are complete; a parameter does not know its modules."""
        if self._engines_checked or not joined():
            return
        for module in [x for x in gc.get_objects() if issubclass(type(x), nn.Module) and _averages(x)]:
            if any(id(param) in self._hooks for param in module.parameters()):
                raise RuntimeError(_AVERAGED.format(fqn, type(module).__name__))
        self._engines_checked = True


class _Sample:
    """Some numbers of an uncompressed layer's gradient, as they were when it was complete.

    On an accelerator, where to compare them is to wait for it, they are taken in steps 1, 2, 4, 8 and so on only.
    """

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.handle = _register(param, self._take)
        self._numbers: Tensor | None = None
        self._step = 1

    @classmethod
    def of_smallest(cls, params: Iterable[Tensor]) -> _Sample | None:
        """Of the parameter of fewest elements on this rank, but of some."""
        some = [p for p in params if p.requires_grad and not is_lazy(p) and local(p).numel() and not is_fake(p)]
        return cls(min(some, key=lambda param: local(param).numel())) if some else None

    def forget(self) -> None:
        """Begin another step."""
        self._numbers, self._step = None, self._step + 1

    def changed(self) -> bool:
        """Whether the gradient has other numbers now."""
        if self._numbers is None or self.param.grad is None or capturing():
            return False
        now = _some(local(self.param.grad))
        return now is None or not torch.allclose(now, self._numbers, rtol=0.0, atol=0.0, equal_nan=True)

    @_disable_dynamo
    def _take(self, param: Tensor) -> None:
        waits = param.device.type != "cpu" and self._step & (self._step - 1) != 0
        if param.grad is not None and not waits and not capturing():
            numbers = _some(local(param.grad.detach()))
            self._numbers = None if numbers is None else numbers.clone()


def _some(grad: Tensor) -> Tensor | None:
    return grad.reshape(-1)[:SAMPLE] if grad.layout is torch.strided else None


def _register(param: Any, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a method when a parameter's gradient is complete, while its object is alive: parameters outlive those."""
    reference = weakref.WeakMethod(hook)

    def call(param: Tensor) -> None:
        if (live := reference()) is not None:
            live(param)

    handle: RemovableHandle = param.register_post_accumulate_grad_hook(call)
    return handle


def _steps_alone(record: str, param: Tensor) -> bool:
    """Whether a layer may be stepped while other layers are not, decided by what all ranks know.

    Ranks that share its states agree first, by one collective for all such layers: in backward every layer would need a
    collective of its own. So they have no hook, and keep their gradients until ``optimizer.step()``.
    """
    return LayerRecord.from_record(record).stock_count is None and not part_of(record, param).sharing


def refuse_step_in_backward(optimizer: Any, made: Plan | CompressedGroups, model: nn.Module) -> None:
    """Refuse what can be known before the first backward pass.

    Args:
        optimizer: what `compress` was given, perhaps a trainer's wrapper.
        made: what will become of the optimizer inside, or the converted one.

    Raises:
        ValueError: compressed layers have no update rule of ours; the model is wrapped by what averages gradients;
            Accelerate accumulates gradients or scales them.
    """
    if isinstance(made, Plan):
        layers = [planned.layer for planned in made.layers if planned.layer.compressed]
    else:
        layers = [LayerRecord.from_record(record) for record in made.compression.records]
        if made.compression.watcher is not None:
            raise ValueError(
                "step_in_backward=True: this optimizer has a monitor, which wants gradients when optimizer.step() is "
                "called; call monitor.detach(optimizer) before"
            )
    if not layers:
        return
    if stock := [layer.fqn for layer in layers if layer.stock_count is not None]:
        raise ValueError(
            f"step_in_backward=True: {', '.join(stock)} would be stepped by the optimizer's own step, which steps all "
            "of its layers. Only layers of Adam, AdamW, SparseAdam, Adagrad, RMSprop and SGD can be stepped in "
            "backward: convert this optimizer by a call of its own, without step_in_backward"
        )
    if wrapped := next((module for module in model.modules() if _averages(module)), None):
        raise ValueError(_AVERAGED.format(layers[0].fqn, type(wrapped).__name__))
    if getattr(optimizer, "scaler", None) is not None:
        raise ValueError(f"step_in_backward=True: {_NO_SCALER.format(layers[0].fqn)}")
    if getattr(getattr(optimizer, "gradient_state", None), "num_steps", 1) > 1:
        raise ValueError(
            f"step_in_backward=True: Accelerate accumulates gradients over {optimizer.gradient_state.num_steps} "
            f"backward passes, and {layers[0].fqn} would be stepped in each. Set gradient_accumulation_steps=1, or "
            "leave step_in_backward=False"
        )


def refuse_settings(found: Mapping[str, Any]) -> None:
    """Refuse settings of a trainer that do not go with steps in backward.

    Args:
        found: by reason, what is true if it holds.

    Raises:
        ValueError: some hold; it names them.
    """
    if wrong := [reason for reason, holds in found.items() if holds]:
        raise ValueError(
            f"step_in_backward=True does not work with {'; nor with '.join(wrong)}. Or leave step_in_backward=False"
        )


def _averages(module: nn.Module) -> bool:
    return any(cls.__name__ in _AVERAGING for cls in type(module).__mro__)


def _refuse_scaler(optimizer: Optimizer, names: str) -> None:
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise RuntimeError(_NO_SCALER.format(names))


def _some_names(names: Iterable[str]) -> str:
    first, *others = [*names] or ["compressed layers"]
    return f"{first} and {len(others)} more" if others else first


_SECOND = (
    "{}: its gradient was complete a second time since the last optimizer.step(), and by the first it was stepped in "
    "backward (step_in_backward=True). The second was not used. Call optimizer.step() once after every backward(). "
    "Gradients that are accumulated over several backward passes, or thrown away, and closures that are evaluated "
    "several times need step_in_backward=False; gradients that are not for training can be had from "
    "torch.autograd.grad, and checkpointed parts that share a layer need use_reentrant=False"
)
_SCALED = (
    "gradients of uncompressed layers were changed after backward, as clipping by norm, a GradScaler or averaging "
    "among processes does. It did not reach {}, stepped in backward (step_in_backward=True). optimizer.step() changed "
    "nothing. Do without it, or leave step_in_backward=False; if it is meant for the uncompressed layers alone, give "
    "them an optimizer of their own"
)
_NO_SCALER = (
    "{}: gradients in backward are those of the scaled loss, which a GradScaler divides only afterwards, so layers "
    "cannot be stepped there. Train in bfloat16 without a GradScaler, or leave step_in_backward=False"
)
_AVERAGED = (
    "{}: {} averages gradients among processes after they are complete, so a step in backward would go by those of "
    "this process alone. Use FSDP2 (fully_shard), which averages them before, or leave step_in_backward=False"
)
