"""`compress` and `decompress`: convert an optimizer in place."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch.layers.record import RECORDS, LayerPart, LayerRecord
from lightning_sketch.layers.transcode import (
    decode_flat,
    decode_layer,
    encode_layer,
    fresh_state,
)
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.classes import compressed_class
from lightning_sketch.optimizer.compression import Compression, StepMonitor
from lightning_sketch.optimizer.coverage import check_coverage
from lightning_sketch.optimizer.existing_states import check_states, has_history, is_fresh
from lightning_sketch.optimizer.guard import refuse_zero_redundancy
from lightning_sketch.optimizer.in_backward import refuse_step_in_backward
from lightning_sketch.optimizer.lossy import warn_of_lossy
from lightning_sketch.optimizer.masked_rows import warn_of_masked_rows
from lightning_sketch.optimizer.nonfinite import NonFinite
from lightning_sketch.optimizer.on_device import scaler_on_device
from lightning_sketch.optimizer.swap import refresh_wrapper, swap_class
from lightning_sketch.policy.dropped import warn_of_dropped
from lightning_sketch.policy.plan import Plan, make_plan, refuse_replaced
from lightning_sketch.policy.policy import Policy, PolicyLike, as_policy
from lightning_sketch.rules.families import rule_of
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import is_dtensor
from lightning_sketch.sharding.agree import is_rank_zero, several_ranks

logger = logging.getLogger(__name__)

OptimizerT = TypeVar("OptimizerT")


@overload
def compress(
    optimizer: list[Any] | tuple[Any, ...],
    model: nn.Module,
    policy: PolicyLike = None,
    *,
    nonfinite: NonFinite = "raise",
    allow_empty: bool = False,
    step_in_backward: bool = False,
    monitor: StepMonitor | None = None,
) -> list[Any]: ...


@overload
def compress(
    optimizer: OptimizerT,
    model: nn.Module,
    policy: PolicyLike = None,
    *,
    nonfinite: NonFinite = "raise",
    allow_empty: bool = False,
    step_in_backward: bool = False,
    monitor: StepMonitor | None = None,
) -> OptimizerT: ...


def compress(
    optimizer: Any,
    model: nn.Module,
    policy: PolicyLike = None,
    *,
    nonfinite: NonFinite = "raise",
    allow_empty: bool = False,
    step_in_backward: bool = False,
    monitor: StepMonitor | None = None,
) -> Any:
    """Compress the states of an optimizer, in place: the same object comes back, so schedulers and handles stay valid.

    Works before the first step and in the middle of training, where existing dense states are encoded; the relative
    error of each is in ``report(optimizer).conversion_errors``. Layers that the policy keeps train bit for bit as
    before. A converted optimizer may be converted again with the same policy, which does nothing.

    Rules of ours step Adam, AdamW, SparseAdam, Adagrad, RMSprop and SGD, with every codec. An optimizer of any other
    class takes element-wise codecs (`BFloat16`, `Quantized`): its own step works on decoded states, a few layers at a
    time.

    Args:
        optimizer: a ``torch.optim.Optimizer``; or Accelerate's, Lightning's or Fabric's wrapper around one. Or a list
            of several over parameters of the same model: what the policy compresses is then judged over all of them.
        model: the module that owns the optimizer's parameters; gives names and roles.
        policy: a `Policy`, its dictionary, a preset's name, the path of its YAML file, or ``None`` for
            `default_policy()`.
        nonfinite: what to do about NaN and inf in a compressed layer's gradient. Their rows are left out of the step
            (elements, where every state of the layer is stored by element): parameter and states stay as they are
            there, and everything else is stepped. Then "raise" raises, and "skip" warns once and counts. "propagate"
            leaves nothing out, as torch.optim does. Optimizers without a rule of ours always do what their own step
            does.
        allow_empty: whether `policy` may compress nothing: what it matches is frozen or not in this optimizer. A
            warning then says so; without a policy it always does, and the optimizer is converted all the same.
        step_in_backward: whether compressed layers are stepped inside of ``backward()``, each as soon as its gradient
            is complete, which is then freed; ``optimizer.step()``, called after every backward pass, steps the others.
            The results are the same bits. For training without DDP and DeepSpeed, accumulation, clipping by the norm
            of all gradients and GradScaler, which raise where they can be seen; see `optimizer.in_backward`.
        monitor: a `Monitor`, which keeps exact states of a few rows beside the compressed ones and says how far apart
            they are; docs/monitor.md.

    Returns:
        `optimizer`; of several, a list of them.

    Raises:
        TypeError: FSDP1 has flattened parameters, or what an optimizer without a rule keeps cannot be found out.
        ValueError: the policy does not fit, or compresses nothing, or layers cannot be stepped in backward or watched
            by a monitor; nothing was changed.

    >>> import torch
    >>> from lightning_sketch import Policy, Rule, compress
    >>> model = torch.nn.Embedding(30_000, 16)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> policy = Policy([Rule(role="embedding", exp_avg="BFloat16", exp_avg_sq="RowWise")])
    >>> type(compress(optimizer, model, policy))
    <class 'lightning_sketch.optimizer.classes.CompressedAdamW'>
    """
    several = isinstance(optimizer, list | tuple)
    optimizers = list(optimizer) if several else [optimizer]
    if not optimizers:
        raise ValueError("compress() was given an empty list of optimizers")
    explicit = policy is not None
    compress_all(
        optimizers,
        model,
        policy,
        explicit=explicit,
        nonfinite=nonfinite,
        allow_empty=allow_empty,
        step_in_backward=step_in_backward,
        monitor=monitor,
    )
    return optimizers if several else optimizer


def compress_all(
    optimizers: Sequence[Any],
    model: nn.Module,
    policy: PolicyLike,
    *,
    explicit: bool,
    nonfinite: NonFinite,
    allow_empty: bool,
    step_in_backward: bool = False,
    monitor: StepMonitor | None = None,
) -> None:
    """`compress` several optimizers of one model; what the policy compresses is judged over all of them.

    Args:
        explicit: whether the user gave the policy, so that it is an error if it compresses nothing.

    Raises:
        TypeError, ValueError: as `compress` does; no optimizer was changed.
    """
    if nonfinite not in ("raise", "skip", "propagate"):
        raise ValueError(f"nonfinite={nonfinite!r}: must be 'raise', 'skip' or 'propagate'")
    if len({id(unwrap(optimizer)) for optimizer in optimizers}) < len(optimizers):
        raise ValueError("compress() was given the same optimizer twice, or an optimizer and its wrapper")
    chosen = as_policy(policy)
    plans = [_plan(unwrap(optimizer), model, chosen) for optimizer in optimizers]
    if not plans or any(isinstance(made, Plan) for made in plans):
        check_coverage(model, chosen, plans, explicit=explicit, allow_empty=allow_empty)
    for optimizer, made in zip(optimizers, plans, strict=True):
        if step_in_backward:
            refuse_step_in_backward(optimizer, made, model)
        if monitor is not None:
            monitor.check(_decided(made), unwrap(optimizer).param_groups, step_in_backward=step_in_backward)
    for made in plans:
        if isinstance(made, CompressedOptimizer):
            _reattach(made, model, None if policy is None else chosen, nonfinite, step_in_backward)
    for optimizer, made in zip(optimizers, plans, strict=True):
        if isinstance(made, Plan):
            _convert(optimizer, made, model, chosen, nonfinite, step_in_backward)
        inner = unwrap(optimizer)
        # Without layers, too, where other ranks may have some: figures are made together.
        watched = isinstance(inner, CompressedOptimizer) and (inner.compression.records or several_ranks())
        if monitor is not None and watched:
            monitor.attach(inner)


def _decided(made: Plan | CompressedOptimizer) -> list[LayerRecord]:
    """The compressed layers of an optimizer, or of one that will be converted."""
    if isinstance(made, Plan):
        return [planned.layer for planned in made.layers if planned.layer.compressed]
    return [LayerRecord.from_record(record) for record in made.compression.records]


def _plan(optimizer: Optimizer, model: nn.Module, policy: Policy) -> Plan | CompressedOptimizer:
    """What will become of an optimizer; one that is converted is returned as it is."""
    refuse_zero_redundancy(optimizer)
    if isinstance(optimizer, CompressedOptimizer):
        return optimizer
    refuse_replaced(optimizer.param_groups)
    made = make_plan(model, optimizer.param_groups, rule_of(optimizer), policy, optimizer.state)
    check_states(optimizer, made)
    return made


def _convert(
    optimizer: Any, made: Plan, model: nn.Module, policy: Policy, nonfinite: NonFinite, step_in_backward: bool
) -> None:
    inner = unwrap(optimizer)
    errors: dict[str, dict[str, float]] = {}
    for group, planned in zip(inner.param_groups, made.groups, strict=True):
        group[RECORDS] = [x.record for x in planned]
        for param, x in zip(group["params"], planned, strict=True):
            if x.layer.compressed and param in inner.state:
                state = inner.state.pop(param)
                if not is_fresh(state, group, inner.defaults):
                    encoded, errors[x.layer.fqn] = encode_layer(x.layer, param, group, state)
                    inner.state[param] = _entries_of_others(param, state, {"step", *x.layer.codecs}) | encoded
                elif state:  # Adagrad allocates in its constructor, and DCP takes it that all layers have state or none
                    inner.state[param] = fresh_state(x.layer, param, group)
    compression = Compression(policy, weakref.ref(model), nonfinite, errors=errors, step_in_backward=step_in_backward)
    compression.describe(made)
    compression.remember_plain(inner.param_groups)
    inner.compression = compression  # type: ignore[attr-defined]
    reads_scaler = hasattr(inner, "_step_supports_amp_scaling") and scaler_on_device(made, inner.param_groups)
    swap_class(inner, compressed_class(inner))
    if reads_scaler:
        inner._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    refresh_wrapper(optimizer)
    assert isinstance(inner, CompressedOptimizer)
    inner.follow_backward()
    _announce(made, inner, model)
    warn_of_lossy(inner, errors)


def decompress(optimizer: OptimizerT) -> OptimizerT:
    """Give an optimizer its own class and dense states back, in place.

    A dropped first moment comes back as zeros. States are made dense layer by layer.

    Args:
        optimizer: a converted optimizer, or a wrapper around one; any other is returned as it is.

    Returns:
        `optimizer`.

    Raises:
        FloatingPointError: as ``optimizer.step()`` does, for the last one on an accelerator. Nothing was changed then.
        ValueError: a parameter was resized (see `resize_states`), or a state is not what was compressed. Nothing was
            changed then.
    """
    inner = unwrap(optimizer)
    if not isinstance(inner, CompressedOptimizer):
        return optimizer
    inner.compression.judge_left_out(wait=True)
    inner.encode_assigned()
    for group, param, (part, *_) in [x for x in inner.compressed_tensors() if not inner.is_flat(x[0])]:
        state = inner.state.get(param, {})
        if dense := decode_layer(part.layer, param, group, state):
            stored = {key for entries in part.layout(param).values() for key in entries}
            inner.state[param] = _entries_of_others(param, state, {"step", *stored}) | dense
    for flat in inner.compression.flat or ():
        if flat.parts and (state := inner.state.get(flat.tensor)):
            inner.state[flat.tensor] = decode_flat(flat.parts, flat.tensor, inner.flat_group(flat), state)
    inner.forget_conversion()
    swap_class(inner, inner.stock)
    if any(group.get("fused") for group in inner.param_groups):
        inner._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    refresh_wrapper(optimizer)
    return optimizer


def _entries_of_others(param: Tensor, state: Mapping[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """What a wrapper keeps beside a layer's states, and states that are switched off; conversions leave it alone.

    Not beside a DTensor's, whose checkpoints have no place for it.
    """
    return {} if is_dtensor(param) else {key: value for key, value in state.items() if key not in ours}


def _reattach(
    optimizer: CompressedOptimizer,
    model: nn.Module,
    policy: Policy | None,
    nonfinite: NonFinite,
    step_in_backward: bool,
) -> None:
    old = optimizer.compression
    if policy is not None and old.policy is not None and policy != old.policy:
        raise ValueError(
            "this optimizer is already compressed under another policy; call decompress(optimizer) before compressing "
            f"it anew.\n  now:   {old.policy}\n  asked: {policy}"
        )
    if old.model() is not model:
        _rename(optimizer, model)
    old.policy = old.policy or policy
    old.model, old.nonfinite, old.step_in_backward = weakref.ref(model), nonfinite, step_in_backward
    optimizer.follow_backward()


def _rename(optimizer: CompressedOptimizer, model: nn.Module) -> None:
    """Have layers the names that `model` gives them: a part of it was given before, as for an optimizer of its own.

    Their hash seeds follow their names, so layers that were stepped keep both.
    """
    old = optimizer.compression
    stepped = any(map(has_history, optimizer.state.values()))
    if old.policy is None or stepped or any(map(optimizer.is_flat, optimizer.param_groups)):
        return
    if not any(group["params"] for group in optimizer.param_groups):  # DeepSpeed's ZeRO-3 hides them
        return
    made = make_plan(model, optimizer.param_groups, optimizer.rule, old.policy)
    for group, planned in zip(optimizer.param_groups, made.groups, strict=True):
        group[RECORDS] = [x.record for x in planned]
    old.describe(made)


def _announce(made: Plan, optimizer: CompressedOptimizer, model: nn.Module) -> None:
    warn_of_dropped(made)
    if not is_rank_zero():
        return
    warn_of_masked_rows(model, optimizer)
    parts = [part for _, _, parts in optimizer.compressed_tensors() for part in parts]
    if sketched := [part.layer.fqn for part in parts if _sketches_some_rows(part)]:
        logger.warning(
            "%s: sharded by rows, so every rank sketches its own rows only; where frequent rows lie together, as in "
            "vocabularies sorted by frequency, that costs quality. CountSketch(sync=True) keeps one sketch of all "
            "rows, and a sketch is exact under column shards (fully_shard(..., shard_placement_fn=...) with Shard(1))",
            ", ".join(sketched),
        )


def _sketches_some_rows(part: LayerPart) -> bool:
    """Whether a layer has several rows to a bucket, and ranks have sketches of their own."""
    return part.shard.table_rows < part.shard.global_rows and any(
        codec.shares_buckets(part.shard) and state not in part.sharing for state, codec in part.layer.codecs.items()
    )
