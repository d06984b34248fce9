"""Whether a policy compresses what its rules match: a rule for a frozen table, say, does nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from lightning_sketch.layers.record import RECORDS
from lightning_sketch.layers.roles import NamedLayer, named_layers
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.policy.plan import LayerPlan, Plan
from lightning_sketch.policy.policy import Policy
from lightning_sketch.sharding.agree import is_rank_zero

logger = logging.getLogger(__name__)

#: How many parameters of a rule a message names.
_SHOWN = 3


def check_coverage(
    model: nn.Module,
    policy: Policy,
    plans: Sequence[Plan | CompressedGroups],
    *,
    explicit: bool,
    allow_empty: bool,
) -> None:
    """Warn of rules that compress no parameter; raise if the whole policy compresses none.

    Frozen parameters without states do not count, though they will be compressed once they are unfrozen.

    Args:
        plans: of all optimizers that the policy is meant for; in place of a plan, an optimizer that is converted.
        explicit: whether the policy was given; of the default policy nothing is demanded.
        allow_empty: warn instead of raising.

    Raises:
        ValueError: an explicit policy compresses nothing.
    """
    if not any(rule.compresses for rule in policy.rules):
        return  # it asks for nothing
    layers = named_layers(model, policy.role_hints)
    held: dict[str, LayerPlan | None] = {}
    compressed: set[str] = set()
    for made in plans:
        if isinstance(made, Plan):
            held |= {x.layer.fqn: x for x in made.layers}
            compressed |= {x.layer.fqn for x in made.layers if x.layer.compressed and not x.stateless}
        else:
            for fqn, record in _by_name(made, layers):
                held[fqn] = None
                compressed |= set() if record is None else {fqn}
    idle = _idle_rules(policy, layers, held, compressed)
    if compressed:
        _warn(idle)
    elif not explicit:
        _warn([f"nothing is compressed. {_why_not_default(layers, idle)}. {_preset(layers, held)}"])
    else:
        reasons = "\n  ".join(idle or policy.unmatched(layers))
        frozen = any(x is not None and x.frozen and x.layer.compressed for x in held.values())
        later = "Frozen layers of the optimizer will be compressed once they are unfrozen. " if frozen else ""
        message = f"the policy compresses nothing of what is trained:\n  {reasons}\n{later}"
        if not allow_empty:
            raise ValueError(f"{message}If this is intended, pass allow_empty=True. Nothing was changed.")
        _warn([message.rstrip()])


def _by_name(optimizer: CompressedGroups, layers: Mapping[int, NamedLayer]) -> Iterator[tuple[str, str | None]]:
    """The parameters of a converted optimizer and their records, under the model's names: it may know a part of it."""
    for group in optimizer.param_groups:
        # An engine may have joined parameters, and groups of a checkpoint may have no records yet.
        for param, record in zip(group["params"], group.get(RECORDS, ()), strict=False):
            if id(param) in layers:
                yield layers[id(param)].fqn, record


def _idle_rules(
    policy: Policy,
    layers: Mapping[int, NamedLayer],
    held: Mapping[str, LayerPlan | None],
    compressed: set[str],
) -> list[str]:
    """What to say about each rule that matches parameters and compresses none."""
    assigned = policy.assign(layers)
    messages = []
    for index, rule in enumerate(policy.rules):
        matched = [layers[key] for key, chosen in assigned.items() if chosen == index]
        if not rule.compresses or not matched or any(layer.fqn in compressed for layer in matched):
            continue
        reasons: dict[str, list[str]] = {}
        for layer in matched:
            reasons.setdefault(_reason(layer, held), []).append(layer.fqn)
        why = "; ".join(f"{_listing(fqns)}: {reason}" for reason, fqns in reasons.items())
        messages.append(f"policy rule {index + 1} ({rule.describe()}) compresses nothing: {why}")
    return messages


def _reason(layer: NamedLayer, held: Mapping[str, LayerPlan | None]) -> str:
    frozen = "frozen (requires_grad=False)"
    if layer.fqn not in held:
        return "not in the optimizer" + ("" if layer.param.requires_grad else f", {frozen}")
    return "the optimizer keeps no state that the rule compresses" if layer.param.requires_grad else frozen


def _listing(fqns: Sequence[str]) -> str:
    rest = len(fqns) - _SHOWN
    return ", ".join(fqns[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _why_not_default(layers: Mapping[int, NamedLayer], idle: Sequence[str]) -> str:
    """Why the default policy compresses nothing."""
    if idle:
        return "Of the default policy, " + "; ".join(idle)
    tables = [layer for layer in layers.values() if layer.roles & {"embedding", "softmax"}]
    if not tables:
        return "The default policy is for embedding and softmax tables, and the model has none"
    largest = max(tables, key=lambda layer: layer.shape[0] if layer.shape else 1)
    rows = f"{largest.shape[0]:,}" if largest.shape else "no"
    return (
        "The default policy is for embedding and softmax tables of 10,000 rows or more, and the largest, "
        f"{largest.fqn}, has {rows}"
    )


def _preset(layers: Mapping[int, NamedLayer], held: Mapping[str, LayerPlan | None]) -> str:
    """The one-line policy that would compress the matrices that are trained."""
    trained = [layer for layer in layers.values() if layer.fqn in held and layer.param.requires_grad]
    planned = [held[layer.fqn] for layer in trained]
    if planned and all(x is not None and not x.layer.codecs for x in planned):
        return "The optimizer keeps no states (is momentum 0?)"
    for role, what in (("hidden", "hidden layers"), ("embedding", "tables"), ("softmax", "tables")):
        if any(role in layer.roles for layer in trained):
            preset = f'Policy([Rule(role="{role}", first_moment="BFloat16", second_moment="Factored")])'
            return f"To compress the {what}, pass {preset}"
    return "The optimizer trains no matrix that a policy could compress"


def _warn(messages: Sequence[str]) -> None:
    # Python shows warnings of unconfigured loggers.
    for message in messages if is_rank_zero() else ():
        logger.warning("%s", message)
