"""What every converted optimizer does: torch's own step for kept layers, our rules for compressed ones."""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch import checkpoint, stock_step
from lightning_sketch.assigned import encode_assigned
from lightning_sketch.bound import Bindings
from lightning_sketch.dropped import warn_of_dropped
from lightning_sketch.flat import FlatTensor, FlatTensors
from lightning_sketch.guard import guard_foreign_steps
from lightning_sketch.layer import RECORDS, Layer, LayerShard
from lightning_sketch.nonfinite import LeftOut
from lightning_sketch.plan import LayerPlan, Plan, make_plan
from lightning_sketch.policy import Policy
from lightning_sketch.roles import find_model, named_layers
from lightning_sketch.rules import UpdateRule
from lightning_sketch.sharding.deepspeed import read_layout
from lightning_sketch.sharding.wrapper import find_wrapper
from lightning_sketch.step import own_tensors, refuse_kept_sparse, step_compressed, to_be_stepped

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
        skipped: in how many steps something of a layer was left out, because its gradient was not finite.
        plain: the user's plain tensors beside the model's parameters, which torch steps. A tensor that is no
            ``nn.Parameter`` and not among them was put in place of the parameters by an engine.
    """

    policy: Policy | None
    model: Callable[[], nn.Module | None]
    nonfinite: NonFinite
    records: list[str] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    plain: list[Tensor] = field(default_factory=list)

    def describe(self, made: Plan) -> None:
        """Take records and names from the plan of all groups."""
        self.records = [x.record for x in made.layers if x.record is not None]
        self.names = [[x.layer.fqn for x in group] for group in made.groups]

    def remember_plain(self, groups: list[dict[str, Any]]) -> None:
        """Take the plain tensors in `groups` for the user's own."""
        self.plain += [param for group in groups for param in group["params"] if not isinstance(param, nn.Parameter)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        # The model's copy, where it was made before; where it is made after, `find_model` finds it.
        model = memo.get(id(self.model()))
        reference = _no_model if model is None else weakref.ref(model)
        copies = list(self.records), [list(names) for names in self.names], dict(self.errors), self.skipped.copy()
        return Compression(self.policy, reference, self.nonfinite, *copies, copy.deepcopy(self.plain, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # A model cannot travel by weak reference, nor a policy with a lambda; only add_param_group needs them.
        portable = self.policy is not None and all(rule.match is None for rule in self.policy.rules)
        policy = self.policy if portable else None
        kept = self.records, self.names, self.errors, self.skipped, self.plain
        return Compression, (policy, _no_model, self.nonfinite, *kept)


class CompressedOptimizer(Optimizer):
    """Mixin in front of a torch optimizer class. Made by `compress`; its constructor makes a plain ``stock`` optimizer.

    ``__name__`` is the stock class's, because metrics, profiles and printed optimizers are named after it; pickle goes
    by ``__qualname__``.
    """

    stock: ClassVar[type[Optimizer]]
    rule: ClassVar[UpdateRule]
    _compression: Compression
    _flat_tensors: FlatTensors | None = None
    _stepping = _loading = False  # whether `step`, or `load_state_dict`, is running

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stock" in vars(cls):  # not what trainers derive
            cls.__name__ = cls.stock.__name__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain optimizer of the stock class for ``type(optimizer)(params, **options)``; copies pass no arguments."""
        return cls.stock(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @stock_step.with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Compressed layers are updated by lightning_sketch; all others by torch's own step, which does not see the
        gradients of the compressed ones meanwhile.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            AssertionError: ``capturable=True``, a compressed layer is on a device that has no graphs, and the step is
                not compiled. Nothing was changed then.
            FloatingPointError: rows of a compressed layer's gradient are not finite, and ``nonfinite="raise"``. They
                were left out, and everything else was stepped. On accelerators it is raised when the next step
                begins, which is not made then; of steps that a graph replays, by the next outside of it.
            RuntimeError: a step is captured into a graph that would not be another one in every replay; it was not
                made. Or a kept layer has a sparse gradient, which torch's own step does not take. Nothing was changed
                if it is the layer's in the first step.
            TypeError: a compressed layer's gradient has an unsupported layout. Nothing was changed then.
            ValueError: a layer's shape changed, its group's hyperparameters ask for what it was compressed without, or
                its states are neither what its codecs store nor dense ones. Nothing was changed then.
        """
        self._left_out.judge(self._compression, wait=False)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._bind_if_flat():
            return loss
        with torch.no_grad():
            if not self._bindings.kept_checked:
                refuse_kept_sparse(self)
                self._bindings.kept_checked = True
            ours = own_tensors(self, compiling=torch.compiler.is_compiling())
            ready = to_be_stepped(self, ours)
            try:
                for own in ours:
                    own.param.grad = None
                stock_step.run(self)
            except RuntimeError:
                refuse_kept_sparse(self)  # a table whose first gradient comes in a later step
                raise
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
            if self.is_flat(group):
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
        unknown = self._flat_tensors is None and any(map(self.is_flat, self.param_groups))
        ours = {} if unknown else {id(tensor): parts for _, tensor, parts in self.compressed_tensors()}
        ours |= {id(flat.tensor): flat.parts for flat in self._flat_tensors or ()}
        shown = {id(tensor): tensor for group in self.param_groups for tensor in group["params"]}
        shown |= {id(flat.tensor): flat.tensor for flat in self._flat_tensors or ()}
        return [(tensor, ours.get(key, ())) for key, tensor in shown.items()]

    def is_flat(self, group: dict[str, Any]) -> bool:
        """Whether an engine replaced the group's parameters by tensors of its own."""
        # All of them at once, as engines do; one that joined parameters is reported with the group's length.
        if any(isinstance(param, nn.Parameter) for param in group["params"]):
            return False
        own = self._compression.plain
        return any(all(x is not y for y in own) for x in group["params"])

    def flat_group(self, flat: FlatTensor) -> dict[str, Any]:
        """The group of a flat tensor with compressed layers. Under ZeRO-3 no group shows it between steps."""
        named = zip(self.param_groups, self._compression.names, strict=True)
        return next(group for group, names in named if flat.anywhere[0] in names)

    def _flat_tensor(self, tensor: Tensor) -> FlatTensor:
        flat = self._flat_tensors
        found = None if flat is None else flat.find(tensor)
        if found is None:
            raise RuntimeError(
                f"a tensor of shape {list(tensor.shape)} took the place of the optimizer's parameters after compress. "
                "If you put it there: call decompress(optimizer) before, and compress it again after. If DeepSpeed "
                "did: its engine cannot be found from the calling code, so call lightning_sketch.attach(engine) after "
                "deepspeed.initialize"
            )
        return found

    @cached_property
    def _bindings(self) -> Bindings:
        return Bindings()

    @cached_property
    def _left_out(self) -> LeftOut:
        return LeftOut()

    def _bind_if_flat(self) -> bool:
        """Find out which layers lie in flat tensors; whether this is only DeepSpeed trying out the step."""
        flat = self._flat_tensors
        tensors = [t for group in self.param_groups if self.is_flat(group) for t in group["params"]]
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
            number = next(i for i, other in enumerate(self.param_groups) if other is group)
            group[RECORDS] = [planned.record for planned in self._decide(group, number)]
        records: list[str | None] = group[RECORDS]
        if len(records) != len(group["params"]):
            raise RuntimeError(
                f"a group of {len(records)} parameters was compressed, and now holds {len(group['params'])}: something "
                "changed its parameters; call decompress(optimizer) before, and compress it again after"
            )
        return records

    def _decide(self, group: dict[str, Any], number: int) -> list[LayerPlan]:
        """What the policy says about a group, by position."""
        model, policy = self._model_and_policy()
        return make_plan(model, [group], self.rule, policy, first_group=number).layers

    def _model_and_policy(self) -> tuple[nn.Module, Policy]:
        compression = self._compression
        model, policy = compression.model(), compression.policy
        if model is None and (model := find_model(compression.names, self.param_groups)) is not None:
            compression.model = weakref.ref(model)
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
            ValueError: a parameter is not the model's, or a plain tensor is one that the policy would compress.
                Nothing was changed then.
        """
        params = param_group["params"]
        if isinstance(params, set):
            super().add_param_group(param_group)  # raises: a set has no order
        listed = [params] if isinstance(params, Tensor) else list(params)
        param_group["params"] = listed
        tensors = [p[1] if isinstance(p, tuple) else p for p in listed]
        decided = self._decide({**self.defaults, **param_group, "params": tensors}, len(self.param_groups))
        super().add_param_group(param_group)
        self.param_groups[-1][RECORDS] = [planned.record for planned in decided]
        self._compression.records += [planned.record for planned in decided if planned.record is not None]
        self._compression.remember_plain(self.param_groups[-1:])
        self._compression.names.append([planned.layer.fqn for planned in decided])
        warn_of_dropped(Plan((tuple(decided),)))

    def encode_assigned(self) -> None:
        """Verify the states of all compressed layers, and encode dense ones that were assigned to them.

        Raises:
            ValueError: see `assigned.encode_assigned`. Nothing was changed then.
        """
        encode_assigned(self)

    def forget_conversion(self) -> None:
        """Let go of everything that is kept beside the groups and states, whose records and codecs are gone."""
        for group in self.param_groups:
            del group[RECORDS]
        for name in ("_compression", "_flat_tensors", "_bindings", "_left_out"):
            vars(self).pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, loadable with ``weights_only=True``; states of DTensor parameters are DTensors.

        Raises:
            FloatingPointError: as `step` does, for the last one on an accelerator.
            ValueError: a compressed layer was assigned states that its codecs cannot take.
        """
        self._left_out.judge(self._compression, wait=True)
        self._bind_if_flat()
        self.encode_assigned()
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
        self._loading = True
        try:
            super().load_state_dict(stock_dict)
        finally:
            del self._loading
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's load_state_dict, bound before the conversion, ends here: it has cast our tensors, and checked nothing.
        if not self._loading and state.keys() == {"state", "param_groups"}:
            raise RuntimeError(
                "load_state_dict of the optimizer as it was before compress() was called, which cannot load compressed "
                "states; nothing was changed. Something kept that method: call compress() before "
                "optimizer.load_state_dict is wrapped, or take it from the optimizer anew"
            )
        super().__setstate__(state)

    def _patch_step_function(self) -> None:
        super()._patch_step_function()
        guard_foreign_steps(CompressedOptimizer)  # here, because copies and unpickled ones are converted, too


def _no_model() -> None:
    return None
