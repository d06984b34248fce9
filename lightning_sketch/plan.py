"""Plan: what a policy does to an optimizer, layer by layer, before anything is allocated. Works on the meta device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_sketch.codecs import SM3, Drop, Keep
from lightning_sketch.kernels.reference import layer_seed
from lightning_sketch.layer import Layer, LayerShard
from lightning_sketch.policy import STATE_NAMES, Policy, default_policy
from lightning_sketch.roles import NamedLayer, named_layers
from lightning_sketch.rules import UpdateRule
from lightning_sketch.sharding import Shard, shard_of


@dataclass(frozen=True)
class LayerPlan:
    """One parameter of the optimizer.

    Args:
        layer: names, codecs and seed.
        roles: the parameter's roles.
        rule: number of the deciding policy rule, from 1; ``None`` if no rule matched.
        bytes_before: bytes of the whole layer's states as torch keeps them, by state; all shards together. None for a
            frozen layer without states, for which torch makes none.
        bytes_after: bytes under the policy, by state.
        frozen: whether the parameter does not require gradients.
    """

    layer: Layer
    roles: tuple[str, ...]
    rule: int | None
    bytes_before: Mapping[str, int]
    bytes_after: Mapping[str, int]
    frozen: bool = False

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
    """

    groups: tuple[tuple[LayerPlan, ...], ...]

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

    def dropped(self) -> dict[str, list[str]]:
        """Layers that lose a state altogether: state name -> FQNs."""
        found: dict[str, list[str]] = {}
        for planned in self.layers:
            for state, codec in planned.layer.codecs.items():
                if isinstance(codec, Drop):
                    found.setdefault(state, []).append(planned.layer.fqn)
        return found

    def __str__(self) -> str:
        from lightning_sketch.tables import plan_table  # rich is slow to import

        return plan_table(self)


def plan(model: nn.Module, optimizer: Optimizer, policy: Policy | Mapping[str, Any] | None = None) -> Plan:
    """What ``compress(optimizer, model, policy)`` would do. Allocates nothing and changes nothing.

    Args:
        model: the model, on any device, the meta device included.
        optimizer: a supported optimizer over parameters of `model`.
        policy: a policy, its dictionary, or ``None`` for `default_policy()`.

    Raises:
        TypeError: the optimizer class is not supported.
        ValueError: the policy does not fit the model or the optimizer, or the optimizer holds parameters that are not
            the model's, or one parameter twice.
    """
    from lightning_sketch.classes import rule_of, unwrap  # optimizer plans its own conversion

    inner = unwrap(optimizer)
    return make_plan(model, inner.param_groups, rule_of(inner), as_policy(policy), inner.state)


def as_policy(policy: Policy | Mapping[str, Any] | None) -> Policy:
    """Accept a policy, its dictionary, or ``None``."""
    if policy is None:
        return default_policy()
    return policy if isinstance(policy, Policy) else Policy.from_dict(policy)


def make_plan(
    model: nn.Module,
    groups: list[dict[str, Any]],
    rule: UpdateRule,
    policy: Policy,
    existing: Mapping[Any, Any] | None = None,
) -> Plan:
    """Resolve `policy` for `groups`; see `plan`.

    Args:
        existing: the optimizer's states. A frozen parameter counts only if it has one.
    """
    layers = named_layers(model, policy.role_hints)
    assigned = policy.assign(layers)
    _check_membership(groups, layers)
    deciding = {assigned.get(id(p)) for group in groups for p in group["params"]}
    _check_states_named(policy, deciding, groups, rule)
    return Plan(
        tuple(
            tuple(
                _plan_layer(layers[id(p)], assigned.get(id(p)), policy, rule, group, bool((existing or {}).get(p)))
                for p in group["params"]
            )
            for group in groups
        )
    )


def _plan_layer(
    named: NamedLayer, index: int | None, policy: Policy, rule: UpdateRule, group: Mapping[str, Any], has_state: bool
) -> LayerPlan:
    states = rule.states(group)
    chosen = policy.rules[index] if index is not None else None
    codecs = {s.name: chosen.codec_for(s.name, signed=s.signed) if chosen else Keep() for s in states}
    layer = Layer.make(named.fqn, layer_seed(policy.seed, named.fqn), named.param, states, codecs)
    whole = LayerShard(layer, Shard.whole(layer.shape))
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    if layer.compressed:
        if named.param.is_complex():
            raise ValueError(
                f"{layer.fqn} is complex; compressed layers must be real: let the policy keep it, or optimize "
                "torch.view_as_real of it"
            )
        rule.check(group, layer.fqn)
        shard_of(named.param, layer.fqn)  # refuses placements that no codec can serve
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
    return LayerPlan(layer, tuple(sorted(named.roles)), None if index is None else index + 1, before, after, frozen)


def _check_one_momentum(layer: Layer) -> None:
    if not any(isinstance(codec, SM3) and codec.momentum for codec in layer.codecs.values()):
        return
    for state, codec in layer.codecs.items():
        if layer.signed[state] and not isinstance(codec, Drop):
            raise ValueError(
                f"{layer.fqn}: SM3(momentum=...) is the layer's momentum, so {state} must be dropped: "
                f"add {state}=Drop() to the rule"
            )


def _check_membership(groups: list[dict[str, Any]], layers: Mapping[int, NamedLayer]) -> None:
    seen: set[int] = set()
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if id(param) not in layers:
                raise ValueError(
                    f"parameter {i} of group {g} (shape {list(param.shape)}) is not a parameter of the model; pass the "
                    "model that owns it, as compress(optimizer, model)"
                )
            if id(param) in seen:
                raise ValueError(f"{layers[id(param)].fqn} is in the optimizer twice; remove it from one of the groups")
            seen.add(id(param))


def _check_states_named(
    policy: Policy, deciding: set[int | None], groups: list[dict[str, Any]], rule: UpdateRule
) -> None:
    """A rule whose codecs name none of the optimizer's states would silently keep its layers."""
    states = {s.name: s.signed for group in groups for s in rule.states(group)}
    generic = {"first_moment" if signed else "second_moment" for signed in states.values()}
    for number, policy_rule in enumerate(policy.rules, start=1):
        named = [n for n in STATE_NAMES if n in policy_rule.codecs and number - 1 in deciding]
        if named and not set(named) & (set(states) | generic):
            raise ValueError(
                f"policy rule {number} ({policy_rule.describe()}) gives codecs for {', '.join(named)}, but this "
                f"optimizer keeps {', '.join(states) or 'no state at all (is momentum 0?)'}"
            )
