"""The converted optimizer: torch's own class for kept layers, our rules for compressed ones."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from lightning_sketch import checkpoint
from lightning_sketch.gradient import RowGradient, row_gradient
from lightning_sketch.layer import RECORDS, Layer
from lightning_sketch.plan import make_plan
from lightning_sketch.policy import Policy
from lightning_sketch.rules import AdagradRule, AdamRule, AdamWRule, RMSpropRule, SGDRule, SparseAdamRule, UpdateRule
from lightning_sketch.sharding import shard_of

logger = logging.getLogger(__name__)

NonFinite = Literal["raise", "skip", "propagate"]


@dataclass
class Compression:
    """What a converted optimizer remembers beside its groups and state.

    Args:
        policy: the policy that decided.
        model: weak reference to the model, to resolve parameters that are added later.
        nonfinite: what to do about NaN and inf gradients of compressed layers.
        errors: relative error of each state that was encoded from a dense one, by FQN and state.
        skipped: how many steps each layer skipped for a non-finite gradient.
    """

    policy: Policy | None
    model: Callable[[], nn.Module | None]
    nonfinite: NonFinite
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        return Compression(self.policy, self.model, self.nonfinite, dict(self.errors), self.skipped.copy())

    def __reduce__(self) -> tuple[Any, ...]:
        # A model cannot travel by weak reference, nor a policy with a lambda; only add_param_group needs them.
        portable = self.policy is not None and all(rule.match is None for rule in self.policy.rules)
        return Compression, (self.policy if portable else None, _no_model, self.nonfinite, self.errors, self.skipped)


class CompressedOptimizer(Optimizer):
    """Mixin in front of a torch optimizer class. Made by `compress`, never constructed."""

    stock: ClassVar[type[Optimizer]]
    rule: ClassVar[UpdateRule]
    _compression: Compression

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Compressed layers are updated by lightning_sketch; all others by torch's own step, which does not see the
        gradients of the compressed ones meanwhile.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            FloatingPointError: a compressed layer's gradient is not finite, and ``nonfinite="raise"``. Nothing was
                changed then.
            TypeError: a compressed layer's gradient has an unsupported layout. Nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            hidden = [(p, p.grad) for _, _, p in self.compressed_layers() if p.grad is not None]
            gradients = self._read_gradients()
            try:
                for param, _ in hidden:
                    param.grad = None
                _unhooked(self.stock.step)(self)
            finally:
                for param, grad in hidden:
                    param.grad = grad
            for group, layer, param, gradient in gradients:
                if param not in self.state or not self.state[param]:
                    self.state[param] = layer.allocate(param, group)
                layer.step(self.rule, param, gradient, group, self.state[param])
        return loss

    def compressed_layers(self) -> Iterator[tuple[dict[str, Any], Layer, Tensor]]:
        """Every compressed layer as ``(group, layer, param)``."""
        for group in self.param_groups:
            for record, param in zip(self._records(group), group["params"], strict=True):
                if record is not None:
                    yield group, self._layer(record), param

    def _records(self, group: dict[str, Any]) -> list[dict[str, Any] | None]:
        """A live group's layer records. A group without any is decided now."""
        # Lightning's BaseFinetuning, when it resumes, replaces param_groups by those of the (dense) checkpoint.
        if RECORDS not in group:
            group[RECORDS] = self._decide(group)
        records: list[dict[str, Any] | None] = group[RECORDS]
        if len(records) != len(group["params"]):
            raise RuntimeError(
                f"a group of {len(records)} parameters was compressed, and now holds {len(group['params'])}: something "
                "replaced its parameters, as DeepSpeed does by flat partitions, which are not supported"
            )
        return records

    def _decide(self, group: dict[str, Any]) -> list[dict[str, Any] | None]:
        """What the policy says about a group, by position."""
        model, policy = self._compression.model(), self._compression.policy
        if model is None or policy is None:
            raise RuntimeError(
                "this optimizer no longer knows its model, so the policy cannot decide new parameters; call "
                "compress(optimizer, model, policy) again first"
            )
        return [planned.record for planned in make_plan(model, [group], self.rule, policy).layers]

    def _layer(self, record: dict[str, Any]) -> Layer:
        # Parsing a record costs more than a small layer's step. The record is the truth; this remembers its meaning.
        cache: dict[int, tuple[dict[str, Any], Layer]] = self.__dict__.setdefault("_layer_cache", {})
        found = cache.get(id(record))
        if found is None or found[0] is not record:
            found = cache[id(record)] = (record, Layer.from_record(record))
        return found[1]

    def _read_gradients(self) -> list[tuple[dict[str, Any], Layer, Tensor, RowGradient]]:
        """All compressed layers' gradients, checked before anything changes."""
        found = []
        for group, layer, param in self.compressed_layers():
            if param.grad is None:
                continue
            self.rule.check(group, layer.fqn)
            lacking = [state.name for state in self.rule.states(group) if state.name not in layer.codecs]
            if lacking:
                raise ValueError(
                    f"{layer.fqn} was compressed without {', '.join(lacking)}, which the group's hyperparameters now "
                    "ask for; call decompress(optimizer) and compress it again"
                )
            if tuple(param.shape) != layer.shape:
                raise ValueError(
                    f"{layer.fqn} now has shape {list(param.shape)}, but its states were laid out for "
                    f"{list(layer.shape)}; compress the new optimizer again"
                )
            found.append((group, layer, param, row_gradient(param.grad, shard_of(param, layer.fqn), layer.fqn)))
        if self._compression.nonfinite == "propagate" or not found:
            return found
        finite = _finite([gradient.values for *_, gradient in found])
        bad = [layer.fqn for (_, layer, _, _), ok in zip(found, finite, strict=True) if not ok]
        if bad and self._compression.nonfinite == "raise":
            raise FloatingPointError(
                f"NaN or inf in the gradient of {', '.join(bad)}. Nothing was changed. One bad row would spoil every "
                'row that shares its state; use compress(..., nonfinite="skip") to leave such layers out of a step'
            )
        for fqn in bad:
            if not self._compression.skipped[fqn]:
                warnings.warn(f"NaN or inf in the gradient of {fqn}: its update is skipped", stacklevel=4)
            self._compression.skipped[fqn] += 1
        return [item for item, ok in zip(found, finite, strict=True) if ok]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; the policy decides its layers.

        Raises:
            RuntimeError: the model is gone (the optimizer was unpickled, or the model deleted).
            ValueError: a parameter is not the model's. Nothing was changed then.
        """
        params = param_group["params"]
        if isinstance(params, set):
            super().add_param_group(param_group)  # raises: a set has no order
        listed = [params] if isinstance(params, Tensor) else list(params)
        param_group["params"] = listed
        tensors = [p[1] if isinstance(p, tuple) else p for p in listed]
        records = self._decide({**self.defaults, **param_group, "params": tensors})
        super().add_param_group(param_group)
        self.param_groups[-1][RECORDS] = records

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # DCP passes `state_dict` by name
        """Load a checkpoint of this optimizer, or of the same optimizer uncompressed, whose states are then encoded.

        Raises:
            ValueError: the checkpoint was written under another policy, seed, shape or format version, or is damaged.
                Nothing was changed then.
        """
        before, after = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy()
        for pre_hook in before.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        stock_dict, restored = checkpoint.prepare_load(self, state_dict)
        # torch would cast our tensors to the parameter's dtype, so it gets none; hooks must see them all the same.
        self._optimizer_load_state_dict_pre_hooks = type(before)()
        self._optimizer_load_state_dict_post_hooks = type(after)()
        try:
            super().load_state_dict(stock_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = before
            self._optimizer_load_state_dict_post_hooks = after
        for param, tensors in restored:
            self.state[param] = tensors
        for post_hook in after.values():
            post_hook(self)

    def __repr__(self) -> str:
        """torch's, without the records."""
        return "\n".join(line for line in super().__repr__().split("\n") if not line.strip().startswith(RECORDS))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_compression": self._compression}


class CompressedAdam(CompressedOptimizer, Adam):
    """``torch.optim.Adam`` with compressed states."""

    stock, rule = Adam, AdamRule()


class CompressedAdamW(CompressedOptimizer, AdamW):
    """``torch.optim.AdamW`` with compressed states."""

    stock, rule = AdamW, AdamWRule()


class CompressedSparseAdam(CompressedOptimizer, SparseAdam):
    """``torch.optim.SparseAdam`` with compressed states."""

    stock, rule = SparseAdam, SparseAdamRule()


class CompressedAdagrad(CompressedOptimizer, Adagrad):
    """``torch.optim.Adagrad`` with compressed states."""

    stock, rule = Adagrad, AdagradRule()


class CompressedRMSprop(CompressedOptimizer, RMSprop):
    """``torch.optim.RMSprop`` with compressed states."""

    stock, rule = RMSprop, RMSpropRule()


class CompressedSGD(CompressedOptimizer, SGD):
    """``torch.optim.SGD`` with compressed states."""

    stock, rule = SGD, SGDRule()


COMPRESSED: dict[type[Optimizer], type[CompressedOptimizer]] = {
    cls.stock: cls
    for cls in (
        CompressedAdam, CompressedAdamW, CompressedSparseAdam, CompressedAdagrad, CompressedRMSprop, CompressedSGD
    )
}  # fmt: skip


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside an AcceleratedOptimizer or a LightningOptimizer."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def compressed_class(optimizer: Optimizer) -> type[CompressedOptimizer]:
    """The class that `optimizer` is converted to, or already has.

    Raises:
        TypeError: the class is not supported.
    """
    if isinstance(optimizer, CompressedOptimizer):
        return type(optimizer)
    if type(optimizer) not in COMPRESSED:
        supported = ", ".join(f"torch.optim.{cls.__name__}" for cls in COMPRESSED)
        raise TypeError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} cannot be compressed; supported are {supported}"
            " (exactly these classes: a subclass may update parameters in ways we would not reproduce)"
        )
    return COMPRESSED[type(optimizer)]


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The update rule of an optimizer."""
    return compressed_class(optimizer).rule


def _no_model() -> None:
    return None


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's step without the wrapper that runs step hooks: those already run around ours."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def _finite(tensors: list[Tensor]) -> list[bool]:
    """Whether all elements of each tensor are finite, with one synchronisation if they are."""
    # A finite sum has finite terms only, and summing is the fastest pass there is, without temporaries. A sum that is
    # not finite may just have overflowed, so then look closer.
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    likely = torch.stack([x.to(sums[0].device, torch.float32) for x in sums]).isfinite().tolist()
    return [ok or bool(tensor.isfinite().all()) for ok, tensor in zip(likely, tensors, strict=True)]
