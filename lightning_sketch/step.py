"""The compressed layers' side of an optimizer's step: find the tensors, judge their gradients, step them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of Dynamo
from torch.autograd.graph import increment_version

from lightning_sketch.amp import grad_scale, overflowed
from lightning_sketch.assigned import Encoded, commit, find_assigned
from lightning_sketch.bound import BoundPart
from lightning_sketch.counter import counter
from lightning_sketch.fake import is_fake
from lightning_sketch.gradient import RowGradient
from lightning_sketch.kernels import all_finite
from lightning_sketch.kernels.fused import Kind
from lightning_sketch.layer import RECORDS, LayerShard
from lightning_sketch.rules import UpdateRule, run
from lightning_sketch.sharding import is_dtensor, placed_like, show_shards
from lightning_sketch.sharding.agree import all_agree

if TYPE_CHECKING:
    from lightning_sketch.optimizer import CompressedOptimizer


@dataclass(slots=True)
class OwnTensor:
    """A tensor with a gradient that our rules step.

    Args:
        group: its parameter group.
        param: the tensor.
        grad: its gradient, which torch's step does not see.
        parts: what lies in it.
        needed: states that the group's hyperparameters ask for.
        state: ``optimizer.state[param]``, empty before the first step.
        bound: the parts, bound; ``None`` if they have yet to be.
        gradients: of each part, unscaled; empty under ``FakeTensorMode``, where rows cannot be read.
        scale: what `grad` is still to be divided by; ``None`` for nothing.
    """

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    parts: tuple[LayerShard, ...]
    needed: set[str]
    state: dict[str, Any]
    bound: list[BoundPart] | None
    gradients: list[RowGradient]
    scale: float | None = None


@_disable_dynamo  # Dynamo can make nothing of kernels
def own_tensors(optimizer: CompressedOptimizer) -> list[OwnTensor]:
    """Our tensors that have a gradient, checked and with what they are bound to.

    Nothing is changed yet, but that dense states which a user assigned are encoded.

    Raises:
        TypeError: a gradient has an unsupported layout.
        ValueError: a layer's shape changed, its group's hyperparameters ask for what it was compressed without, or its
            states are not what the codecs store.
    """
    rule, bindings, states = optimizer.rule, optimizer._bindings, optimizer.state
    bindings.keep_those_in(states)
    ours: list[OwnTensor] = []
    fake: bool | None = None
    assigned: list[Encoded] = []
    options: dict[int, tuple[set[str], float | None]] = {}  # states that are needed, and the gradients' scale, by group
    for group, param, parts in optimizer.compressed_tensors():
        if (grad := param.grad) is None:
            continue
        if (found := options.get(id(group))) is None:
            rule.check(group, parts[0].layer.fqn)
            found = options[id(group)] = {state.name for state in rule.states(group)}, grad_scale(optimizer, group)
        names, scale = found
        state = states.get(param, {})
        bound = bindings.find(param, parts, names, state)
        if bound is None:
            for part in parts:
                _check(rule, group, part)
        if state and bound is None:
            encoded = find_assigned(group, param, parts, state)
            assigned += [] if encoded is None else [encoded]
        fake = is_fake(param) if fake is None else fake  # one or all
        placed = grad if type(grad) is Tensor else placed_like(grad, param)
        unscaled = placed if scale is None else placed / scale  # `grad` stays: nothing is changed yet
        gradients = [] if fake else [part.gradient(unscaled) for part in parts]
        ours.append(OwnTensor(group, param, grad, parts, names, state, bound, gradients, scale))
    if assigned:
        commit(optimizer, assigned)
    return ours


@_disable_dynamo
def refuse_kept_sparse(optimizer: CompressedOptimizer) -> None:
    """Refuse sparse gradients of layers that the policy keeps, where torch's own optimizer does not take any.

    Raises:
        RuntimeError: as torch does; says how the layer could be trained.
    """
    refused: list[str] = []
    for number, group in enumerate(optimizer.param_groups):
        if optimizer.rule.keeps_sparse(group) or optimizer.is_flat(group):
            continue
        names = optimizer._compression.names[number : number + 1] or [[]]
        for i, (param, record) in enumerate(zip(group["params"], group.get(RECORDS, ()), strict=False)):
            if record is None and param.grad is not None and param.grad.is_sparse:
                refused.append(names[0][i] if i < len(names[0]) else f"parameter {i} of group {number}")
    if refused:
        unsigned = any(not state.signed for state in optimizer.rule.states(optimizer.param_groups[0]))
        codec = "second_moment=RowWise()" if unsigned else "first_moment=BFloat16()"
        raise RuntimeError(
            f"{', '.join(refused)}: torch's {optimizer.stock.__name__} does not support sparse gradients under these "
            "options, and the policy keeps such layers as torch does. Compressed layers may have them: add a rule, "
            f"e.g. Rule(name={refused[0]!r}, {codec}), or give the layer dense gradients (sparse=False)"
        )


@_disable_dynamo
def usable(optimizer: CompressedOptimizer, ours: list[OwnTensor]) -> list[OwnTensor]:
    """Those to be stepped: all, or under ``nonfinite="skip"`` those whose gradients are finite on all ranks.

    None of a group that overflowed.

    Raises:
        FloatingPointError: a gradient is not finite, and ``nonfinite="raise"``.
        RuntimeError: there are none because the model's parameters were replaced.
    """
    if not ours:
        _refuse_replaced(optimizer)
    left_alone = {id(group) for group in optimizer.param_groups if overflowed(optimizer, group)}
    ours = [own for own in ours if id(own.group) not in left_alone] if left_alone else ours
    if optimizer._compression.nonfinite == "propagate" or not ours or not ours[0].gradients:
        return ours
    gradients = [gradient for own in ours for gradient in own.gradients]
    wanted = [kind for own in ours for kind in _sums_as(optimizer.rule, own)]
    oks, sums = all_finite([gradient.values for gradient in gradients], wanted)
    for gradient, made in zip(gradients, sums, strict=True):
        gradient.sums = made
    groups = [_process_group(optimizer, own) for own in ours]
    if all(oks) and all(group is None for group in groups):
        return ours
    finite_parts = iter(oks)
    finite = [[next(finite_parts) for _ in own.gradients] for own in ours]
    agreed = all_agree([all(ok) for ok in finite], groups, ours[0].param.device)
    if not all(agreed):
        _refuse(optimizer, ours, finite, agreed)
    return [own for own, ok in zip(ours, agreed, strict=True) if ok]


@_disable_dynamo
def step_compressed(optimizer: CompressedOptimizer, ready: list[OwnTensor]) -> None:
    """One step of our tensors (they and their states are modified in place)."""
    if ready and not ready[0].gradients:  # fake tensors: all that a step leaves behind is states
        for own in ready:
            if not own.state:
                _allocate(optimizer, own)
        return
    rule = optimizer.rule
    counts: list[Tensor] = []
    for own in ready:
        if own.scale is not None:
            own.grad.div_(own.scale)  # torch's kernels leave gradients unscaled, too
        if own.bound is None:
            if not own.state:
                _allocate(optimizer, own)
            own.bound = optimizer._bindings.bind(own.param, own.parts, own.needed, own.group, own.state)
        counts.append(own.state["step"])
    known: dict[tuple[int, int], tuple[Any, int, bool]] = {}  # by group and step
    options: list[tuple[Any, int, bool]] = []  # all of them before anything of ours changes
    for own, count in zip(ready, counts, strict=True):
        key = id(own.group), int(count.item()) + 1
        if (option := known.get(key)) is None:
            step, negate = key[1], bool(own.group.get("maximize", False))
            option = known[key] = rule.numbers(own.group, step), step, negate
        options.append(option)
    if wrappers := [own.param for own in ready if is_dtensor(own.param)]:
        increment_version(wrappers)  # rules write to local tensors, whose versions are their own
    if counts:  # a list of ones: of a number a tensor would be made for every count, which takes longer than adding
        torch._foreach_add_(counts, [counter(1.0)] * len(counts))
    run(
        rule,
        (
            part.step(gradient, numbers, step, negate=negate)
            for own, (numbers, step, negate) in zip(ready, options, strict=True)
            for part, gradient in zip(own.bound or (), own.gradients, strict=True)
        ),
    )


def _allocate(optimizer: CompressedOptimizer, own: OwnTensor) -> None:
    """Make the states of a tensor's first step."""
    fresh: dict[str, Any] = {"step": counter()}
    for part in own.parts:
        fresh |= part.allocate(own.param, own.group)
    own.state = optimizer.state[own.param]
    own.state.update(fresh)


def _refuse_replaced(optimizer: CompressedOptimizer) -> None:
    """Where no gradient comes: ``fully_shard`` after the optimizer was made leaves it parameters of no model."""
    model = optimizer._compression.model()
    ours = [param for group in optimizer.param_groups for param in group["params"] if isinstance(param, nn.Parameter)]
    if model is None or not ours or any(param.grad is not None for param in ours):
        return
    show_shards(model)
    theirs = {id(param) for param in model.parameters()}
    if not any(id(param) in theirs for param in ours):
        raise RuntimeError(
            "none of the optimizer's parameters is the model's any more, so nothing would be trained: something "
            "replaced them, as fully_shard does. Call fully_shard(model) before constructing the optimizer, and "
            "compress it after"
        )


def _check(rule: UpdateRule, group: dict[str, Any], part: LayerShard) -> None:
    layer = part.layer
    if lacking := layer.lacking(rule, group):
        raise ValueError(
            f"{layer.fqn} was compressed without {', '.join(lacking)}, which the group's hyperparameters now "
            "ask for; call decompress(optimizer) and compress it again"
        )
    part.check_shape()


def _sums_as(rule: UpdateRule, own: OwnTensor) -> list[Kind]:
    """For each part, the sums of squares of the gradient that its step begins with; none before the first step."""
    if own.bound is None or rule.coupled_weight_decay(own.group):  # with it they are of something else
        return [Kind.NONE] * len(own.gradients)
    return [part.sums_as for part in own.bound]


def _process_group(optimizer: CompressedOptimizer, own: OwnTensor) -> Any | None:
    part = own.parts[0]
    if part.span is not None:
        return optimizer._flat_tensors.group if optimizer._flat_tensors is not None else None
    if type(own.param) is nn.Parameter:  # most are
        return None
    return optimizer._bindings.shard_group(own.param, part.layer.fqn)


def _refuse(
    optimizer: CompressedOptimizer, ours: list[OwnTensor], finite: list[list[bool]], agreed: list[bool]
) -> None:
    """Raise for non-finite gradients, or warn and count."""
    bad: list[str] = []
    for own, oks, tensor_ok in zip(ours, finite, agreed, strict=True):
        here = [part.layer.fqn for part, ok in zip(own.parts, oks, strict=True) if not ok]
        if not tensor_ok:
            # A shard whose counterpart on another rank is bad must be skipped with it: states would drift apart.
            bad += here or [f"{own.parts[0].layer.fqn} on another rank"]
    if optimizer._compression.nonfinite == "raise":
        raise FloatingPointError(
            f"NaN or inf in the gradient of {', '.join(bad)}. Nothing was changed. One bad row would spoil every "
            'row that shares its state; use compress(..., nonfinite="skip") to leave such layers out of a step, or '
            '"propagate" to let it through as torch.optim does'
        )
    skipped = optimizer._compression.skipped
    for fqn in bad:
        if not skipped[fqn]:
            warnings.warn(f"NaN or inf in the gradient of {fqn}: its update is skipped", stacklevel=8)
        skipped[fqn] += 1
