"""The compressed layers' side of an optimizer's step: find the tensors, and step them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of Dynamo
from torch.autograd.graph import increment_version

from lightning_sketch.kernels import fused_kernel
from lightning_sketch.kernels.capture import capturing
from lightning_sketch.kernels.schema import DeviceNumbers
from lightning_sketch.layers.record import RECORDS, LayerPart
from lightning_sketch.layers.step_count import step_tensor
from lightning_sketch.optimizer.agree import agree
from lightning_sketch.optimizer.amp import amp_on_device, grad_scale, overflowed
from lightning_sketch.optimizer.assigned import Encoded, commit, find_assigned
from lightning_sketch.optimizer.bound import PendingUpdate
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.optimizer.nonfinite import Counted
from lightning_sketch.optimizer.on_device import (
    asked,
    check_capturable,
    check_capture,
    check_kept_capture,
    numbers_of,
    stay_on_device,
)
from lightning_sketch.optimizer.prepared import Prepared
from lightning_sketch.optimizer.proof import proved
from lightning_sketch.rules import UpdateRule, run
from lightning_sketch.sharding import is_dtensor, placed_like, show_shards
from lightning_sketch.sharding.fake import is_fake


@_disable_dynamo  # Dynamo can make nothing of kernels
def pending_updates(optimizer: CompressedGroups, *, compiling: bool = False) -> list[PendingUpdate]:
    """Our tensors that have a gradient, checked and with what they are bound to.

    Nothing is changed yet, but that dense states which a user assigned are encoded. Tensors with states that ranks
    share are among them also without a gradient: another rank may have one.

    Args:
        compiling: whether the optimizer's step is compiled.

    Raises:
        AssertionError: ``capturable=True``, and a parameter is on a device that has no graphs.
        RuntimeError: a graph is being captured, and a layer's step would not be another one in every replay.
        TypeError: a gradient has an unsupported layout.
        ValueError: a layer's shape changed, its group's hyperparameters ask for what it was compressed without, or its
            states are not what the codecs store.
    """
    bindings = optimizer.compression.bindings
    if (prepared := bindings.prepared) is not None:
        if prepared.take_gradients(optimizer.rule, optimizer):
            return prepared.tensors
        bindings.prepared = None
    bindings.keep_those_in(optimizer.state)
    return _pending_updates(optimizer, optimizer.compressed_tensors(), compiling=compiling)


def _pending_updates(
    optimizer: CompressedGroups,
    tensors: Iterable[tuple[dict[str, Any], Tensor, tuple[LayerPart, ...]]],
    *,
    compiling: bool = False,
) -> list[PendingUpdate]:
    """Those of `tensors`, as ``(group, tensor, parts)``, that have a gradient."""
    rule, bindings, states = optimizer.rule, optimizer.compression.bindings, optimizer.state
    ours: list[PendingUpdate] = []
    fake: bool | None = None
    assigned: list[Encoded] = []
    options: dict[int, tuple[set[str], bool, bool]] = {}  # by group: states that are needed, and what `asked` says
    scales: dict[int, float | None] = {}  # what gradients are to be divided by, where the host does it
    if captured := capturing():
        check_kept_capture(optimizer.param_groups)
    for group, param, parts in tensors:
        shared, ranks = optimizer.shared_layers(param, parts)
        if (grad := param.grad) is None and not shared:
            continue
        if (found := options.get(id(group))) is None:
            rule.check(group, parts[0].layer.fqn)
            found = options[id(group)] = {state.name for state in rule.states(group)}, *asked(group)
        names, capturable, on_device = found
        state = states.get(param, {})
        bound = bindings.find(param, parts, names, state)
        on_device = on_device and stay_on_device(group, param, parts)
        if bound is not None and bound[0].on_device is not on_device:
            bound = None
        if capturable and (bound is None or not on_device or captured):
            check_capturable(group, param, parts, compiling=compiling)
        if captured and grad is not None:
            check_capture(param, grad, parts, on_device=on_device, bound=bound is not None)
        if bound is None:
            for part in parts:
                _check(rule, group, part)
        if state and bound is None:
            encoded = find_assigned(group, param, parts, state, shared, ranks)
            assigned += [] if encoded is None else [encoded]
        fake = is_fake(param) if fake is None else fake  # one or all
        scale = None
        if not on_device:
            if id(group) not in scales:
                scales[id(group)] = grad_scale(optimizer, group)
            scale = scales[id(group)]
        if grad is None:
            gradients = [] if fake else [part.no_gradient(param) for part in parts]
        else:
            placed = grad if type(grad) is Tensor else placed_like(grad, param)
            unscaled = placed if scale is None else placed / scale  # `grad` stays: nothing is changed yet
            gradients = [] if fake else [part.gradient(unscaled) for part in parts]
        ours.append(
            PendingUpdate(group, param, grad, parts, names, state, bound, gradients, scale, on_device, shared, ranks)
        )
    if assigned:
        commit(optimizer, assigned)
    return ours


@_disable_dynamo
def refuse_kept_sparse(optimizer: CompressedGroups) -> None:
    """Refuse sparse gradients of layers that the policy keeps, where torch's own optimizer does not take any.

    Raises:
        RuntimeError: as torch does; says how the layer could be trained.
    """
    refused: list[str] = []
    for number, group in enumerate(optimizer.param_groups):
        if optimizer.rule.keeps_sparse(group) or optimizer.is_flat(group):
            continue
        names = optimizer.compression.names[number : number + 1] or [[]]
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
def to_be_stepped(optimizer: CompressedGroups, ours: list[PendingUpdate]) -> list[PendingUpdate]:
    """All but those of a group that overflowed; where the numbers of steps stay on the device, it is asked there.

    Raises:
        RuntimeError: there are none because the model's parameters were replaced.
    """
    if all(own.grad is None for own in ours):
        _refuse_replaced(optimizer)
    by_host = {id(own.group): own.group for own in ours if not own.on_device}
    left_alone = {key for key, group in by_host.items() if overflowed(optimizer, group)}
    return [own for own in ours if own.on_device or id(own.group) not in left_alone] if left_alone else ours


@_disable_dynamo
def step_compressed(optimizer: CompressedGroups, ready: list[PendingUpdate]) -> Counted | None:
    """One step of our tensors (they and their states are modified in place), but of what is not finite in gradients.

    Returns:
        what was left out; ``None`` for nothing, where that is known.
    """
    if not ready:
        return None
    bindings, leave_out = optimizer.compression.bindings, optimizer.compression.nonfinite != "propagate"
    prepared, bindings.prepared = bindings.prepared, None  # unless the step is made
    if prepared is not None and ready is prepared.tensors:
        left_out = prepared.step(optimizer.rule, leave_out=leave_out)
        bindings.prepared = prepared if prepared.valid else None
        return Counted(left_out, prepared.units, ready[0].on_device) if leave_out else None
    counted = _step_each(optimizer, ready, leave_out=leave_out)
    if ready[0].gradients:
        bindings.prepared = Prepared.make(optimizer, ready, bound=len(bindings))
    return counted


@_disable_dynamo
def step_alone(
    optimizer: CompressedGroups, group: dict[str, Any], param: Tensor, parts: tuple[LayerPart, ...]
) -> Counted | None:
    """One step of a single tensor (it and its states are modified in place).

    Args:
        group, param, parts: one of `CompressedGroups.compressed_tensors`; it has a gradient.

    Returns:
        as `step_compressed`.

    Raises:
        RuntimeError, TypeError, ValueError: as `pending_updates` does. Nothing was changed then.
    """
    ready = _pending_updates(optimizer, [(group, param, parts)])
    return _step_each(optimizer, ready, leave_out=optimizer.compression.nonfinite != "propagate")


def _step_each(optimizer: CompressedGroups, ready: list[PendingUpdate], *, leave_out: bool) -> Counted | None:
    """A step of which nothing is prepared."""
    rule = optimizer.rule
    if not ready[0].gradients:  # fake tensors: all that a step leaves behind is states
        for own in ready:
            if not own.state and own.grad is not None:
                _allocate(optimizer, own)
        return None
    ready = _bind_and_agree(optimizer, ready, leave_out=leave_out)
    if not ready:
        return None
    counts: list[Tensor] = [own.state["step"] for own in ready if not own.on_device]
    numbers = _numbers(optimizer, ready)  # all of them before anything of ours changes
    if wrappers := [own.param for own in ready if is_dtensor(own.param)]:
        increment_version(wrappers)  # rules write to local tensors, whose versions are their own
    if counts:  # a list of ones: of a number a tensor would be made for every count, which takes longer than adding
        torch._foreach_add_(counts, [step_tensor(1.0)] * len(counts))
    left_out = run(
        rule,
        (
            part.step(gradient, of_step, step, maximize=maximize, leave_out=leave_out, on_device=on_device)
            for own, (of_step, step, maximize, on_device) in zip(ready, numbers, strict=True)
            for part, gradient in zip(own.bound or (), own.gradients, strict=True)
        ),
    )
    if not leave_out or left_out is None:
        return None
    return Counted(left_out, [part.unit for own in ready for part in own.bound or ()], ready[0].on_device)


def _bind_and_agree(optimizer: CompressedGroups, ready: list[PendingUpdate], *, leave_out: bool) -> list[PendingUpdate]:
    """Bind the tensors, and have ranks agree on the step; those that are to be stepped."""

    def bind(own: PendingUpdate) -> None:
        if not own.state:
            _allocate(optimizer, own)
        own.bound = optimizer.compression.bindings.bind(own.param, own.parts, own.needed, own.group, own.state)
        if own.param.device.type != "cpu":
            _prove(optimizer.rule, own)

    for own in ready:
        if own.bound is None and (own.grad is not None or own.state):
            bind(own)
    if any(own.ranks for own in ready):
        ready = agree(optimizer.rule, ready, bind, leave_out=leave_out)
    for own in ready:
        if own.scale is not None and own.grad is not None:
            own.grad.div_(own.scale)  # torch's kernels leave gradients unscaled, too
    return ready


#: Of a tensor's step: `UpdateRule.numbers`, the step's number, whether to maximize, and what stays on the device.
_Hyperparameters = tuple[Any, int | Tensor, bool, DeviceNumbers | None]


def _numbers(optimizer: CompressedGroups, ready: list[PendingUpdate]) -> list[_Hyperparameters]:
    """The numbers of all tensors' steps. Counts on devices go up by one, those on the host do not yet."""
    rule = optimizer.rule
    known: dict[tuple[int, int], _Hyperparameters] = {}  # by group and step
    apart: dict[tuple[int, torch.device], list[int]] = {}  # by group and device
    found: list[_Hyperparameters | None] = [None] * len(ready)
    for i, own in enumerate(ready):
        if own.on_device:
            apart.setdefault((id(own.group), own.param.device), []).append(i)
            continue
        key = id(own.group), int(own.state["step"].item()) + 1
        if (option := known.get(key)) is None:
            option = known[key] = rule.numbers(own.group, key[1]), key[1], bool(own.group.get("maximize", False)), None
        found[i] = option
    for (_, device), members in apart.items():
        group = ready[members[0]].group
        counts = [ready[i].state["step"] for i in members]
        found_inf, scale = amp_on_device(optimizer, group, device)
        if found_inf is None:
            torch._foreach_add_(counts, 1)
        else:
            torch._foreach_add_(counts, [(found_inf != 1).to(counts[0].dtype)] * len(counts))
        steps = torch.stack(counts).to(torch.float64)
        maximize = bool(group.get("maximize", False))
        for i, of_step, step in zip(members, numbers_of(rule, group, steps), steps.unbind(), strict=True):
            found[i] = of_step, step, maximize, DeviceNumbers(step, found_inf, scale)
    return [option for option in found if option is not None]


def _prove(rule: UpdateRule, own: PendingUpdate) -> None:
    """Have kernels that do not prove right on this device step none of a tensor's parts."""
    if (kernel := fused_kernel(own.param.device)) is None:
        return
    for part, bound, gradient in zip(own.parts, own.bound or (), own.gradients, strict=True):
        sparse = gradient.rows is not None or bound.lazy
        if not proved(
            rule, part.layer, bound.param, own.group, sparse=sparse, kernel=kernel, on_device=bound.on_device
        ):
            bound.cache.fusable = False


def _allocate(optimizer: CompressedGroups, own: PendingUpdate) -> None:
    """Make the states of a tensor's first step."""
    fresh: dict[str, Any] = {"step": step_tensor(device=own.param.device if own.on_device else "cpu")}
    for part in own.parts:
        fresh |= part.allocate(own.param, own.group)
    own.state = optimizer.state[own.param]
    own.state.update(fresh)


def _refuse_replaced(optimizer: CompressedGroups) -> None:
    """Where no gradient comes: ``fully_shard`` after the optimizer was made leaves it parameters of no model."""
    model = optimizer.compression.model()
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


def _check(rule: UpdateRule, group: dict[str, Any], part: LayerPart) -> None:
    layer = part.layer
    if lacking := layer.lacking(rule, group):
        raise ValueError(
            f"{layer.fqn} was compressed without {', '.join(lacking)}, which the group's hyperparameters now "
            "ask for; call decompress(optimizer) and compress it again"
        )
    part.check_shape()
