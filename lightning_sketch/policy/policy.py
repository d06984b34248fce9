"""Policy: which codec for which state of which layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from lightning_sketch.layers.roles import RoleHints
from lightning_sketch.policy.budget import rules_for_budget
from lightning_sketch.policy.plan import Plan, plan_of
from lightning_sketch.policy.presets import PRESETS
from lightning_sketch.policy.rule import RuleSet


class Policy(RuleSet):
    """An ordered list of rules. The first that matches a layer decides; layers without a rule are kept exactly.

    Args:
        rules: `Rule` objects or their dictionaries.
        seed: global hash seed; every layer derives its own from it and its name.
        role_hints: roles that structure does not show: ``{"head.weight": "softmax"}``, or ``"last_linear"``.

    Raises:
        ValueError: no rules, two default rules, or rules behind the default one.

    >>> from lightning_sketch import Drop, RowWise, Rule
    >>> Policy([Rule(role="embedding", min_rows=10_000, exp_avg=Drop(), exp_avg_sq=RowWise())]).seed
    0
    """

    def explain(self, model: nn.Module, optimizer: Any) -> str:
        """The table of layers, roles, rules, codecs and bytes that ``compress`` would make. Changes nothing."""
        return str(plan_of(model, optimizer, self))

    @classmethod
    def preset(cls, name: str, seed: int = 0, role_hints: RoleHints = None) -> Policy:
        """A policy under a name.

        Args:
            name: "tables" (the default policy), "whole-model", "bf16" or "8bit"; docs/policies.md has what each keeps
                and how good it was measured to be, and ``lightning-sketch presets`` lists them.

        Raises:
            ValueError: there is none of this name.

        >>> len(Policy.preset("8bit").rules)
        1
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(map(repr, PRESETS))}")
        return cls(PRESETS[name](), seed, role_hints)

    @classmethod
    def for_budget(
        cls, model: nn.Module, optimizer: Any, budget: int | str, seed: int = 0, role_hints: RoleHints = None
    ) -> Policy:
        """The mildest policy whose optimizer states fit a number of bytes.

        Everything is kept where that fits. Tables are compressed first, from bfloat16 down to row and column means
        without a first moment; hidden layers only if that does not suffice, down the same way; then tables once more,
        to a tenth of a number per row. What is frozen or not in `optimizer` takes no bytes.

        Args:
            budget: bytes, as a number or like ``"1.5GiB"``; for all states of `optimizer` together.

        Raises:
            ValueError: not a size, or the optimizer keeps no states, or nothing fits; says what the least is.
        """
        found = rules_for_budget(model, optimizer, budget, seed, role_hints)
        return cls(found.rules, found.seed, found.role_hints)


def default_policy() -> Policy:
    """What ``compress(optimizer, model)`` does.

    Embedding and softmax tables of 10,000 rows or more lose Adam's first moment (``beta1 = 0``), and keep the second as
    row means and column means with a floor: ``Factored(floor=1)``. SGD's and RMSprop's momentum is kept in bfloat16.
    Everything else is kept exactly.

    Measured in docs/quality.md, "The default policy": ahead of exact Adam at Adam's best learning rate, or level with
    it, in every training of tables there, with sparse and with dense gradients.
    """
    return Policy.preset("tables")


#: What stands for a policy wherever one is asked for.
PolicyLike: TypeAlias = Policy | Mapping[str, Any] | str | Path | None


def as_policy(policy: PolicyLike) -> Policy:
    """Accept a policy, its dictionary, a preset's name, the path of its YAML file, or ``None`` for `default_policy()`.

    >>> as_policy("8bit") == Policy.preset("8bit")
    True

    Raises:
        ValueError: it is none of these, or unknown keys or values.
        OSError: the file cannot be read.
    """
    if policy is None:
        return default_policy()
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return Policy.from_dict(policy)
    if isinstance(policy, str) and policy in PRESETS:
        return Policy.preset(policy)
    if isinstance(policy, str | Path):
        if Path(policy).suffix not in (".yaml", ".yml"):
            raise ValueError(f"policy {str(policy)!r}: neither a preset ({', '.join(PRESETS)}) nor a .yaml file")
        return Policy.from_yaml(policy)
    raise ValueError(
        f"policy={policy!r}: must be a Policy, as Policy([Rule(role='embedding', second_moment=RowWise())]), its "
        "dictionary, a preset's name or the path of a .yaml file"
    )


def plan(model: nn.Module, optimizer: Optimizer, policy: PolicyLike = None) -> Plan:
    """What ``compress(optimizer, model, policy)`` would do. Allocates nothing and changes nothing.

    Args:
        model: the model, on any device, the meta device included.
        optimizer: an optimizer over parameters of `model`.
        policy: as of `compress`.

    Raises:
        TypeError: FSDP1 has flattened parameters, or what an optimizer without a rule keeps cannot be found out.
        ValueError: the policy does not fit the model or the optimizer, or the optimizer holds none of the model's
            parameters, parameters of another model, plain tensors that the policy would compress, or one parameter
            twice.
    """
    return plan_of(model, optimizer, as_policy(policy))
