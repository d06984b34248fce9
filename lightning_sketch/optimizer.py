"""What every converted optimizer does: torch's own step for kept layers, our rules for compressed ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch import checkpoint
from lightning_sketch.assigned import encode_assigned
from lightning_sketch.bound import Bindings
from lightning_sketch.flat import FlatTensor, FlatTensors, is_flat
from lightning_sketch.layer import RECORDS, Layer, LayerShard
from lightning_sketch.plan import LayerPlan, make_plan
from lightning_sketch.policy import Policy
from lightning_sketch.roles import named_layers
from lightning_sketch.rules import UpdateRule
from lightning_sketch.sharding.deepspeed import read_layout
from lightning_sketch.sharding.wrapper import find_wrapper
from lightning_sketch.step import own_tensors, step_compressed, usable

logger = logging.getLogger(__name__)

NonFinite = Literal["raise", "skip", "propagate"]


@dataclass
class Compression:
    """What a converted optimizer remembers beside its groups and state.

    Args:
        policy: the policy that decided.
        model: weak reference to the model, to resolve parameters that are added later.
        nonfinite: what to do about NaN and inf gradients of compressed layers.
        records: the record of every compressed layer. Groups hold them too, but under DeepSpeed not all groups are to
            be seen at all times.
        names: for each group the FQNs of all its parameters, in order.
        errors: relative error of each state that was encoded from a dense one, by FQN and state.
        skipped: how many steps each layer skipped for a non-finite gradient.
    """

    policy: Policy | None
    model: Callable[[], nn.Module | None]
    nonfinite: NonFinite
    records: list[str] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        copies = list(self.records), [list(names) for names in self.names], dict(self.errors), self.skipped.copy()
        return Compression(self.policy, self.model, self.nonfinite, *copies)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model cannot travel by weak reference, nor a policy with a lambda; only add_param_group needs them.
        portable = self.policy is not None and all(rule.match is None for rule in self.policy.rules)
        policy = self.policy if portable else None
        return Compression, (policy, _no_model, self.nonfinite, self.records, self.names, self.errors, self.skipped)


class CompressedOptimizer(Optimizer):
    """Mixin in front of a torch optimizer class. Made by `compress`, never constructed."""

    stock: ClassVar[type[Optimizer]]
    rule: ClassVar[UpdateRule]
    _compression: Compression
    _flat_tensors: FlatTensors | None = None

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
            ValueError: a layer's shape changed, its group's hyperparameters ask for what it was compressed without, or
                its states are neither what its codecs store nor dense ones. Nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._bind_if_flat():
            return loss
        with torch.no_grad():
            ours = own_tensors(self)
            ready = usable(self, ours)
            try:
                for own in ours:
                    own.param.grad = None
                _unhooked(self.stock.step)(self)
            finally:
                for own in ours:
                    own.param.grad = own.grad
            step_compressed(self, ready)
        return loss

    def compressed_tensors(self) -> Iterator[tuple[dict[str, Any], Tensor, tuple[LayerShard, ...]]]:
        """Every tensor that our rules step, as ``(group, tensor, parts)``.

        A parameter, whole or DTensor, is one part; a flat tensor of DeepSpeed has several, some of kept layers.
        """
        for group in self.param_groups:
            if is_flat(group):
                for tensor in group["params"]:
                    if parts := self._flat_tensor(tensor).parts:
                        yield group, tensor, parts
            elif group["params"]:
                for record, param in zip(self._records(group), group["params"], strict=True):
                    if record is not None:
                        yield group, param, (self._bindings.part(record, param),)

    def compressed_layers(self) -> Iterator[tuple[dict[str, Any], Layer, Tensor]]:
        """Every compressed layer as ``(group, layer, tensor)``; once for each tensor that holds a part of it."""
        for group, tensor, parts in self.compressed_tensors():
            for layer in {part.layer.fqn: part.layer for part in parts if part.layer.compressed}.values():
                yield group, layer, tensor

    def all_tensors(self) -> list[tuple[Tensor, tuple[LayerShard, ...]]]:
        """Every tensor that may have a state, with the parts that our rules step.

        Under DeepSpeed that includes those that no group shows at the moment.
        """
        # Before DeepSpeed's first step no flat tensor is known, nor has any a state.
        unknown = self._flat_tensors is None and any(map(is_flat, self.param_groups))
        ours = {} if unknown else {id(tensor): parts for _, tensor, parts in self.compressed_tensors()}
        ours |= {id(flat.tensor): flat.parts for flat in self._flat_tensors or ()}
        shown = {id(tensor): tensor for group in self.param_groups for tensor in group["params"]}
        shown |= {id(flat.tensor): flat.tensor for flat in self._flat_tensors or ()}
        return [(tensor, ours.get(key, ())) for key, tensor in shown.items()]

    def flat_group(self, flat: FlatTensor) -> dict[str, Any]:
        """The group of a flat tensor with compressed layers. Under ZeRO-3 no group shows it between steps."""
        named = zip(self.param_groups, self._compression.names, strict=True)
        return next(group for group, names in named if flat.anywhere[0] in names)

    def _flat_tensor(self, tensor: Tensor) -> FlatTensor:
        flat = self._flat_tensors
        found = None if flat is None else flat.find(tensor)
        if found is None:
            raise RuntimeError(
                f"the optimizer was given a tensor of shape {list(tensor.shape)} that is no parameter of the model, as "
                "DeepSpeed does; where DeepSpeed's engine cannot be found from the calling code, call "
                "lightning_sketch.attach(engine) after deepspeed.initialize"
            )
        return found

    @cached_property
    def _bindings(self) -> Bindings:
        return Bindings()

    def _bind_if_flat(self) -> bool:
        """Find out which layers lie in flat tensors; whether this is only DeepSpeed trying out the step."""
        flat = self._flat_tensors
        tensors = [t for group in self.param_groups if is_flat(group) for t in group["params"]]
        if all(flat is not None and flat.find(tensor) is not None for tensor in tensors):
            return False
        wrapper, trial = find_wrapper(self)
        if not trial and wrapper is not None:
            self.bind(wrapper)
        return trial

    def bind(self, wrapper: Any) -> FlatTensors:
        """Take the layout of the flat tensors from DeepSpeed's optimizer wrapper.

        Raises:
            RuntimeError: the layout cannot be read reliably, or is not the model's.
        """
        model, policy = self._model_and_policy()
        layers = [Layer.from_record(record) for record in self._compression.records]
        named = named_layers(model, policy.role_hints)
        self._bindings.clear()
        self._flat_tensors = FlatTensors(read_layout(wrapper), named, {layer.fqn: layer for layer in layers})
        # Adagrad allocates in its constructor, for parameters that are in no group any more.
        for param in [p for p in self.state if isinstance(p, nn.Parameter)]:
            del self.state[param]
        return self._flat_tensors

    def _records(self, group: dict[str, Any]) -> list[str | None]:
        """A live group's layer records. A group without any is decided now."""
        # Lightning's BaseFinetuning, when it resumes, replaces param_groups by those of the (dense) checkpoint.
        if RECORDS not in group:
            group[RECORDS] = [planned.record for planned in self._decide(group)]
        records: list[str | None] = group[RECORDS]
        if len(records) != len(group["params"]):
            raise RuntimeError(
                f"a group of {len(records)} parameters was compressed, and now holds {len(group['params'])}: something "
                "changed its parameters; call decompress(optimizer) before, and compress it again after"
            )
        return records

    def _decide(self, group: dict[str, Any]) -> list[LayerPlan]:
        """What the policy says about a group, by position."""
        model, policy = self._model_and_policy()
        return make_plan(model, [group], self.rule, policy).layers

    def _model_and_policy(self) -> tuple[nn.Module, Policy]:
        model, policy = self._compression.model(), self._compression.policy
        if model is None or policy is None:
            raise RuntimeError(
                "this optimizer no longer knows its model, so the policy cannot decide its parameters; call "
                "compress(optimizer, model, policy) again first"
            )
        return model, policy

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
        decided = self._decide({**self.defaults, **param_group, "params": tensors})
        super().add_param_group(param_group)
        self.param_groups[-1][RECORDS] = [planned.record for planned in decided]
        self._compression.records += [planned.record for planned in decided if planned.record is not None]
        self._compression.names.append([planned.layer.fqn for planned in decided])

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, loadable with ``weights_only=True``; states of DTensor parameters are DTensors.

        Raises:
            ValueError: a compressed layer was assigned states that its codecs cannot take.
        """
        self._bind_if_flat()
        encode_assigned(self)
        return checkpoint.finish_state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # DCP passes `state_dict` by name
        """Load a checkpoint of this optimizer, or of the same optimizer uncompressed, whose states are then encoded.

        Raises:
            ValueError: the checkpoint was written under another policy, seed, shape or format version, or is damaged.
                Nothing was changed then.
        """
        self._bind_if_flat()
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
        self._bindings.clear()  # let go of the states of before
        for post_hook in after.values():
            post_hook(self)

    def __repr__(self) -> str:
        """torch's, without the records."""
        return "\n".join(line for line in super().__repr__().split("\n") if not line.strip().startswith(RECORDS))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_compression": self._compression}


def _no_model() -> None:
    return None


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's step without the wrapper that runs step hooks: those already run around ours."""
    while getattr(step, "hooked", False):  # torch.compile wraps the hooked step of SparseAdam once more
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step
