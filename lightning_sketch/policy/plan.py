"""Plan: what a policy does to an optimizer, layer by layer, before anything is allocated. Works on the meta device."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sketch.codecs import Codec, Keep
from lightning_sketch.kernels.reference import layer_seed
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.roles import RUN_FORWARD_FIRST, NamedLayer, check_module, named_layers
from lightning_sketch.layers.temporaries import Temporaries
from lightning_sketch.policy.rule import Rule, RuleSet
from lightning_sketch.rules import StateDef, UpdateRule
from lightning_sketch.rules.families import Converted, rule_of
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import Shard, is_dtensor, refuse_flattened, shard_of
from lightning_sketch.sharding.agree import joined
from lightning_sketch.text import human_bytes, short, table, without_numbers


@dataclass(frozen=True)
class LayerPlan:
    """One parameter of the optimizer.

    Args:
        layer: names, codecs and seed.
        roles: the parameter's roles; "lazy" of one that has no shape yet.
        rule: number of the deciding policy rule, from 1; ``None`` if no rule matched.
        bytes_before: bytes of the whole layer's states as torch keeps them, by state; all shards together. 0 of a
            frozen layer without states, for which torch makes none, and of a lazy one, whose size is not known yet.
        bytes_after: bytes under the policy, by state; what ranks share, and each has all of, counts once.
        frozen: whether the parameter does not require gradients.
        shard: what of a compressed layer lies here; ``None`` of others.
        dtype: of the parameter.
    """

    layer: LayerRecord
    roles: tuple[str, ...]
    rule: int | None
    bytes_before: Mapping[str, int]
    bytes_after: Mapping[str, int]
    frozen: bool = False
    shard: Shard | None = field(default=None, compare=False)
    dtype: torch.dtype = field(default=torch.float32, compare=False)

    @property
    def stateless(self) -> bool:
        """Whether the layer has no state, and will have none unless it is unfrozen."""
        return self.frozen and not any(self.bytes_before.values())

    @property
    def record(self) -> str | None:
        """What the parameter group says about this parameter: its layer's record, or None if it is kept."""
        return self.layer.to_record() if self.layer.compressed else None


@dataclass(frozen=True)
class Plan:
    """A policy applied to the parameter groups of an optimizer; ``str(plan)`` is the table.

    Args:
        groups: for each parameter group, its layers in order.
        update: the optimizer's rule.
    """

    groups: tuple[tuple[LayerPlan, ...], ...]
    update: UpdateRule | None = field(default=None, compare=False, repr=False)

    @property
    def layers(self) -> list[LayerPlan]:
        return [layer for group in self.groups for layer in group]

    @property
    def bytes_before(self) -> int:
        """Bytes of all states as torch keeps them."""
        return sum(sum(x.bytes_before.values()) for x in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all states under the policy."""
        return sum(sum(x.bytes_after.values()) for x in self.layers)

    def transient(self, device: torch.device | str) -> int | None:
        """Upper bound of what one step of the compressed layers allocates for itself, bytes: on this process, of dense
        gradients, with the kernels that this machine has. `report` says the same of the converted optimizer.

        Args:
            device: where the parameters will be, whether this machine has it or not: "cpu", "cuda", ...

        Returns:
            ``None`` where the optimizer's own step does it, because there is no rule for its class.
        """
        found, device = Temporaries(), torch.device(device)
        for planned in self.layers:
            if planned.shard is None or planned.stateless:
                continue
            if self.update is None or planned.layer.stock_count is not None:
                return None
            param = torch.empty(planned.shard.local_shape, dtype=planned.dtype, device="meta")
            found.add(self.update, LayerPart(planned.layer, planned.shard), param, device)
        return found.bytes()

    def dropped(self) -> dict[str, list[str]]:
        """Layers that lose a state altogether: state name -> FQNs."""
        found: dict[str, list[str]] = {}
        for planned in self.layers:
            for state, codec in planned.layer.codecs.items():
                if codec.drops:
                    found.setdefault(state, []).append(planned.layer.fqn)
        return found

    def __str__(self) -> str:
        """Layer, shape, role, rule, codecs, bytes before and after, and what a step allocates for itself.

        Layers of repeated blocks that are treated alike share one line, and so do layers that no rule matched.
        """
        columns = ("layer", "shape", "role", "rule", "state: codec", ">before", ">after")
        return table("optimizer states", columns, self._rows())

    def _rows(self) -> Iterator[tuple[str, ...] | None]:
        lazy = [x for x in self.layers if x.roles == ("lazy",)]
        unmatched = [x for x in self.layers if x.rule is None and x not in lazy]
        for alike in _folded(x for x in self.layers if x.rule is not None):
            yield _row(alike)
        if unmatched:
            size = human_bytes(sum(sum(x.bytes_before.values()) for x in unmatched))
            frozen = sum(x.frozen for x in unmatched)
            what = "kept as they are" + (f" ({frozen} frozen)" if frozen else "")
            yield f"{len(unmatched)} other parameters", "", "", "none", what, size, size
        if lazy:
            yield f"{len(lazy)} lazy parameters", "not known yet", "", "none", "kept as they are", "", ""
        yield None
        yield "total", "", "", "", "", human_bytes(self.bytes_before), human_bytes(self.bytes_after)
        for device in ("cpu", "cuda"):
            if (transient := self.transient(device)) is not None:
                yield f"temporaries of a step on {device}, at most", "", "", "", "", "", human_bytes(transient)


def _folded(layers: Iterable[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers that are treated alike, and whose names differ only in numbers, together."""
    found: dict[Hashable, list[LayerPlan]] = {}
    for planned in layers:
        layer, before = planned.layer, tuple(planned.bytes_before.values())
        kind = (without_numbers(layer.fqn), layer.shape, planned.roles, planned.rule, tuple(layer.codecs.items()))
        found.setdefault((*kind, planned.frozen, before), []).append(planned)
    return list(found.values())


def _row(alike: list[LayerPlan]) -> tuple[str, ...]:
    """Cells of the plan's table, of layers that are treated alike."""
    first, layer = alike[0], alike[0].layer
    name = layer.fqn if len(alike) == 1 else f"{without_numbers(layer.fqn)}  x {len(alike)}"
    return (
        name + (" (frozen)" if first.frozen else ""),
        " x ".join(f"{n:,}" for n in layer.shape) or "scalar",
        ", ".join(first.roles),
        str(first.rule),
        "\n".join(f"{state}: {short(codec)}" for state, codec in layer.codecs.items()),
        human_bytes(sum(sum(x.bytes_before.values()) for x in alike)),
        human_bytes(sum(sum(x.bytes_after.values()) for x in alike)),
    )


def plan_of(model: nn.Module, optimizer: Any, rules: RuleSet) -> Plan:
    """What `rules` would do to an optimizer, converted or not; see `policy.plan`."""
    inner = unwrap(optimizer)
    if not isinstance(inner, Converted):  # its groups may show an engine's tensors, or none
        refuse_replaced(inner.param_groups)
    return make_plan(model, inner.param_groups, rule_of(inner), rules, inner.state)


def refuse_replaced(groups: list[dict[str, Any]]) -> None:
    """Refuse an optimizer without parameters.

    Raises:
        ValueError: it holds plain tensors only, the user's or an engine's.
    """
    tensors = [tensor for group in groups for tensor in group["params"]]
    plain = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
    if len(plain) < len(tensors):
        return  # parameters of another model are refused by name
    # ZeRO-3 shows its tensors during a step only: before and after, all groups are empty.
    if not tensors or (joined() and "deepspeed" in sys.modules):
        raise ValueError(
            "the optimizer holds no parameters of the model: an engine replaced them by tensors of its own, as "
            "DeepSpeed does. Convert the optimizer before it is given to deepspeed.initialize"
        )
    raise ValueError(
        f"the optimizer holds no parameters of the model, but plain tensors only (of shape {_shapes(plain)}): there is "
        "nothing to compress. Leave this optimizer as it is, or make them parameters (nn.Parameter) of the model first"
    )


def make_plan(
    model: nn.Module,
    groups: list[dict[str, Any]],
    rule: UpdateRule,
    policy: RuleSet,
    existing: Mapping[Any, Any] | None = None,
    *,
    first_group: int = 0,
) -> Plan:
    """Resolve `policy` for `groups`; see `policy.plan`.

    Plain tensors beside the model's parameters are left to torch, under the name "group 0 parameter 3".

    Args:
        existing: the optimizer's states. A frozen parameter counts only if it has one.
        first_group: the number of the first of `groups` in the optimizer.
    """
    check_module(model)
    refuse_flattened(model)
    layers = named_layers(model, policy.role_hints)
    assigned = policy.assign(layers)
    _check_membership(groups, layers, first_group)
    deciding = {assigned.get(id(p)) for group in groups for p in group["params"]}
    _check_states_named(policy, deciding, groups, rule)
    states: Mapping[Any, Any] = existing or {}
    planned: list[tuple[LayerPlan, ...]] = []
    for g, group in enumerate(groups, start=first_group):
        found = []
        for i, param in enumerate(group["params"]):
            if id(param) in layers:
                named, index = layers[id(param)], assigned.get(id(param))
                found.append(_plan_layer(named, index, policy, rule, group, bool(states.get(param))))
            else:
                found.append(_plan_plain_tensor(param, g, i, policy, rule, group))
        planned.append(tuple(found))
    return Plan(tuple(planned), rule)


def _plan_plain_tensor(
    tensor: Tensor, g: int, i: int, policy: RuleSet, rule: UpdateRule, group: Mapping[str, Any]
) -> LayerPlan:
    """A tensor that is no ``nn.Parameter``, beside the model's parameters: torch optimizes it, and so it stays."""
    role = "hidden" if tensor.ndim >= 2 else "other"
    named = NamedLayer(f"group {g} parameter {i}", cast(nn.Parameter, tensor), nn.Module(), {role})
    index = policy.rule_for(named)
    if index is not None and any(not c.exact for c in policy.rules[index].codecs.values()):
        raise ValueError(
            f"parameter {i} of group {g} (shape {list(tensor.shape)}) is a plain tensor and no parameter of the model, "
            f"and policy rule {index + 1} ({policy.rules[index].describe()}) would compress it: register it in the "
            "model as an nn.Parameter, or give the rule a selector that does not match it"
        )
    return _plan_layer(named, index, policy, rule, group, has_state=True)


def _plan_layer(
    named: NamedLayer, index: int | None, policy: RuleSet, rule: UpdateRule, group: Mapping[str, Any], has_state: bool
) -> LayerPlan:
    states = rule.states(group) if named.lazy else rule.states_of(group, named.param)
    if named.lazy:
        return _plan_lazy(named, policy, states)
    chosen = policy.rules[index] if index is not None else None
    codecs = {s.name: _codec_for(chosen, s) for s in states}
    if all(codec.exact for codec in codecs.values()):
        states = rule.kept_states(group, named.param)
        codecs = {s.name: codecs.get(s.name, Keep()) for s in states}
    count = rule.stock_count(group, named.param)
    layer = LayerRecord.make(named.fqn, layer_seed(policy.seed, named.fqn), named.param, states, codecs, count)
    whole = LayerPart(layer, Shard.whole(layer.shape))
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    shard: Shard | None = None
    if layer.compressed:
        if named.param.is_complex():
            raise ValueError(
                f"{layer.fqn} is complex; compressed layers must be real: let the policy keep it, or optimize "
                "torch.view_as_real of it"
            )
        rule.check(group, layer.fqn)
        rule.check_codecs(layer.fqn, codecs)
        shard = shard_of(named.param, layer.fqn)  # refuses placements that no codec can serve
        _check_one_momentum(layer)
    frozen = not named.param.requires_grad
    for state in states:
        dense = math.prod(layer.shape) * named.param.element_size()
        before[state.name] = after[state.name] = dense
        if layer.compressed:
            spec = whole.spec(state.name, named.param, group)
            codecs[state.name].check(spec)
            after[state.name] = codecs[state.name].nbytes(spec)
        if frozen and not has_state:
            before[state.name] = after[state.name] = 0
    number = None if index is None else index + 1
    return LayerPlan(layer, tuple(sorted(named.roles)), number, before, after, frozen, shard, named.param.dtype)


def _codec_for(rule: Rule | None, state: StateDef) -> Codec:
    """The codec that a policy's rule has for a state. What holds weights is no moment: a rule must call it by name."""
    if rule is None:
        return Keep()
    if state.weights:
        return rule.codecs.get(state.name, Keep())
    return rule.codec_for(state.name, signed=state.signed)


def _plan_lazy(named: NamedLayer, policy: RuleSet, states: Sequence[StateDef]) -> LayerPlan:
    """A layer without a shape is kept, unless a rule might compress it once it has one."""
    for number, rule in enumerate(policy.rules, start=1):
        if rule.misses(named):
            continue
        if rule.compresses:
            raise ValueError(
                f"{named.fqn} is lazy: it has no shape yet, so whether and how policy rule {number} "
                f"({rule.describe()}) compresses it is not known; {RUN_FORWARD_FIRST}"
            )
        if not rule.asks_shape:
            break
    layer = LayerRecord(named.fqn, layer_seed(policy.seed, named.fqn), (), {s.name: s.signed for s in states}, {})
    unknown = {state.name: 0 for state in states}
    return LayerPlan(layer, ("lazy",), None, unknown, unknown)


def _check_one_momentum(layer: LayerRecord) -> None:
    with_momentum = next((codec for codec in layer.codecs.values() if codec.momentum), None)
    if with_momentum is None:
        return
    for state, codec in layer.codecs.items():
        if layer.signed[state] and not codec.drops:
            raise ValueError(
                f"{layer.fqn}: {type(with_momentum).__name__}(momentum=...) is the layer's momentum, so {state} must "
                f"be dropped: add {state}=Drop() to the rule"
            )


_AFTER_FORWARD = (
    ". Under fully_shard an optimizer that is made after a forward pass without a backward one has the gathered "
    "parameters, and trains nothing: call model.reshard() before it is made"
)


def _check_membership(groups: list[dict[str, Any]], layers: Mapping[int, NamedLayer], first_group: int) -> None:
    seen: set[int] = set()
    for g, group in enumerate(groups, start=first_group):
        for i, param in enumerate(group["params"]):
            if id(param) not in layers and isinstance(param, nn.Parameter):
                divided = any(is_dtensor(layer.param) for layer in layers.values())
                raise ValueError(
                    f"parameter {i} of group {g} (shape {_shapes([param])}) is not a parameter of the model; pass the "
                    "model that owns it, as compress(optimizer, model), or if one optimizer trains several modules, "
                    "nn.ModuleList of them" + (_AFTER_FORWARD if divided else "")
                )
            if id(param) in seen:
                name = layers[id(param)].fqn if id(param) in layers else f"parameter {i} of group {g}"
                raise ValueError(f"{name} is in the optimizer twice; remove it from one of the groups")
            seen.add(id(param))


def _check_states_named(
    policy: RuleSet, deciding: set[int | None], groups: list[dict[str, Any]], rule: UpdateRule
) -> None:
    """A rule whose codecs name none of the optimizer's states keeps its layers, which only an optional one may."""
    states = {s.name: s.signed for group in groups for s in rule.states(group)}
    generic = {"first_moment" if signed else "second_moment" for signed in states.values()}
    for number, policy_rule in enumerate(policy.rules, start=1):
        named = list(policy_rule.codecs) if number - 1 in deciding else []
        if named and not policy_rule.optional and not set(named) & (set(states) | generic):
            raise ValueError(
                f"policy rule {number} ({policy_rule.describe()}) gives codecs for {', '.join(named)}, but this "
                f"optimizer keeps {', '.join(states) or 'no state at all (is momentum 0?)'}"
            )


def _shapes(tensors: list[Tensor]) -> str:
    shown = ["not known yet" if is_lazy(tensor) else str(list(tensor.shape)) for tensor in tensors[:3]]
    return ", ".join(shown) + (", ..." if len(tensors) > 3 else "")
