"""The layers in a converted optimizer's parameter groups."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_sketch.layers.flat import FlatTensor, FlatTensors
from lightning_sketch.layers.record import RECORDS, LayerPart, LayerRecord
from lightning_sketch.layers.roles import find_model, named_layers
from lightning_sketch.layers.shared import SharedLayer
from lightning_sketch.optimizer.compression import Compression
from lightning_sketch.policy.plan import LayerPlan, make_plan
from lightning_sketch.policy.policy import Policy
from lightning_sketch.rules.families import Converted
from lightning_sketch.sharding.deepspeed import read_layout
from lightning_sketch.sharding.dtensor import ranks_of
from lightning_sketch.sharding.wrapper import find_wrapper

#: Why a monitor is refused where an engine has made flat tensors.
NO_MONITOR = (
    "a monitor does not work under DeepSpeed's ZeRO, whose flat tensors cut rows anywhere. Use FSDP2 (fully_shard) or "
    "DDP, or train without it"
)


class CompressedGroups(Converted):
    """What converted optimizers know of their parameter groups: which layers we step, and where they lie.

    Attributes:
        compression: everything else that they remember.
    """

    compression: Compression

    def compressed_tensors(self) -> Iterator[tuple[dict[str, Any], Tensor, tuple[LayerPart, ...]]]:
        """Every tensor that our rules step, as ``(group, tensor, parts)``.

        A parameter, whole or DTensor, is one part; a flat tensor of DeepSpeed has several, some of kept layers.
        """
        for group in self.param_groups:
            if self.is_flat(group):
                for tensor in group["params"]:
                    if parts := self.flat_tensor(tensor).parts:
                        yield group, tensor, parts
            elif group["params"]:
                for record, param in zip(self.records(group), group["params"], strict=True):
                    if record is not None:
                        yield group, param, (self.compression.bindings.part(record, param),)

    def compressed_layers(self) -> Iterator[tuple[dict[str, Any], LayerRecord, Tensor]]:
        """Every compressed layer as ``(group, layer, tensor)``; once for each tensor that holds a part of it."""
        for group, tensor, parts in self.compressed_tensors():
            for layer in {part.layer.fqn: part.layer for part in parts if part.layer.compressed}.values():
                yield group, layer, tensor

    def all_tensors(self) -> list[tuple[Tensor, tuple[LayerPart, ...]]]:
        """Every tensor that may have a state, with the parts that our rules step.

        Under DeepSpeed that includes those that no group shows at the moment.
        """
        # Before DeepSpeed's first step no flat tensor is known, nor has any a state.
        unknown = self.compression.flat is None and any(map(self.is_flat, self.param_groups))
        ours = {} if unknown else {id(tensor): parts for _, tensor, parts in self.compressed_tensors()}
        ours |= {id(flat.tensor): flat.parts for flat in self.compression.flat or ()}
        shown = {id(tensor): tensor for group in self.param_groups for tensor in group["params"]}
        shown |= {id(flat.tensor): flat.tensor for flat in self.compression.flat or ()}
        return [(tensor, ours.get(key, ())) for key, tensor in shown.items()]

    def is_flat(self, group: dict[str, Any]) -> bool:
        """Whether an engine replaced the group's parameters by tensors of its own."""
        # All of them at once, as engines do; one that joined parameters is reported with the group's length.
        if any(isinstance(param, nn.Parameter) for param in group["params"]):
            return False
        own = self.compression.plain
        return any(all(x is not y for y in own) for x in group["params"])

    def shared_layers(
        self, param: Tensor, parts: tuple[LayerPart, ...]
    ) -> tuple[tuple[SharedLayer, ...], tuple[Any, ...]]:
        """The layers of a tensor with states that other ranks share, and these ranks' process groups."""
        if parts[0].span is not None:
            flat = self.compression.flat
            assert flat is not None
            shared = self.flat_tensor(param).shared
            return shared, flat.ranks if shared else ()
        shared = parts[0].shared
        return shared, ranks_of(param, parts[0].layer.fqn) if shared else ()

    def flat_group(self, flat: FlatTensor) -> dict[str, Any]:
        """The group of a flat tensor with compressed layers. Under ZeRO-3 no group shows it between steps."""
        named = zip(self.param_groups, self.compression.names, strict=True)
        return next(group for group, names in named if flat.names_on_any_rank[0] in names)

    def flat_tensor(self, tensor: Tensor) -> FlatTensor:
        flat = self.compression.flat
        found = None if flat is None else flat.find(tensor)
        if found is None:
            raise RuntimeError(
                f"a tensor of shape {list(tensor.shape)} took the place of the optimizer's parameters after compress. "
                "If you put it there: call decompress(optimizer) before, and compress it again after. If DeepSpeed "
                "did: its engine cannot be found from the calling code, so call lightning_sketch.attach(engine) after "
                "deepspeed.initialize"
            )
        return found

    def _bind_if_flat(self) -> bool:
        """Find out which layers lie in flat tensors; whether this is only DeepSpeed trying out the step."""
        flat = self.compression.flat
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
            RuntimeError: the layout cannot be read reliably, or is not the model's. Or compressed layers are to be
                stepped in backward.
        """
        if self.compression.step_in_backward:
            raise RuntimeError(
                "step_in_backward=True: under DeepSpeed gradients are complete after backward only, when it has "
                "averaged them among processes. Use FSDP2 (fully_shard), or leave step_in_backward=False"
            )
        if self.compression.watcher is not None:
            raise RuntimeError(NO_MONITOR)
        model, policy = self._model_and_policy()
        layers = [LayerRecord.from_record(record) for record in self.compression.records]
        named = named_layers(model, policy.role_hints)
        self.compression.bindings.clear()
        self.compression.flat = FlatTensors(read_layout(wrapper), named, {layer.fqn: layer for layer in layers})
        # Adagrad allocates in its constructor, for parameters that are in no group any more.
        for param in [p for p in self.state if isinstance(p, nn.Parameter)]:
            del self.state[param]
        return self.compression.flat

    def records(self, group: dict[str, Any]) -> list[str | None]:
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
        compression = self.compression
        model, policy = compression.model(), compression.policy
        if model is None and (model := find_model(compression.names, self.param_groups)) is not None:
            compression.model = weakref.ref(model)
        if model is None or policy is None:
            raise RuntimeError(
                "this optimizer no longer knows its model, so the policy cannot decide its parameters; call "
                "compress(optimizer, model, policy) again first"
            )
        return model, policy
