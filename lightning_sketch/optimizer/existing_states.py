"""States that an optimizer has before it is converted: whether they can be encoded, and whether there are any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_sketch.layers.dtensor_states import held_rows
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.step_count import read_step
from lightning_sketch.layers.transcode import not_finite
from lightning_sketch.policy.plan import Plan
from lightning_sketch.sharding import is_dtensor, local, shard_of
from lightning_sketch.sharding.agree import Places, place, raise_together
from lightning_sketch.sharding.dtensor import ranks_of
from lightning_sketch.sharding.fake import is_fake


def check_states(optimizer: Optimizer, made: Plan) -> None:
    """Existing states must be torch's own, complete, shaped like their parameters, and finite where codecs need it.

    Collective over the ranks of DTensors with states: what one refuses all do.
    """
    problem: ValueError | None = None
    divided: Places = {}
    layers: list[str] = []
    for group, planned in zip(optimizer.param_groups, made.groups, strict=True):
        for param, x in zip(group["params"], planned, strict=True):
            state = optimizer.state.get(param)
            if not x.layer.compressed or not state or is_fresh(state, group, optimizer.defaults):
                continue
            problem = problem or _wrong_state(x.layer, param, group, state)
            layers.append(x.layer.fqn)
            if is_dtensor(param) and not is_fake(param):
                divided |= place(ranks_of(param, x.layer.fqn), local(param).device)
    raise_together(problem, divided, ", ".join(layers))


def _wrong_state(
    layer: LayerRecord, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> ValueError | None:
    """Why a layer's existing state cannot be encoded."""
    try:
        read_step(state.get("step", 1), layer.fqn)
    except ValueError as error:
        return error
    for name in layer.codecs if layer.stock_count is None else ():  # others may make some later
        found = state.get(name)
        if not isinstance(found, Tensor) or found.shape != param.shape:
            return ValueError(
                f"{layer.fqn}: its {name} should be a tensor of shape {list(param.shape)}, found "
                f"{list(found.shape) if isinstance(found, Tensor) else found}; nothing was changed"
            )
    part = LayerPart(layer, shard_of(param, layer.fqn))
    given = {name: state[name] for name in layer.codecs if isinstance(state.get(name), Tensor)}
    dense = {name: held_rows(found, part.shard) for name, found in given.items() if found.shape == param.shape}
    return not_finite([part], param, group, [dense])


def has_history(state: Mapping[str, Any]) -> bool:
    """Whether a layer was ever stepped: Adagrad allocates before the first step, SGD may hold None."""
    step = state.get("step", 1)
    counted = is_fake(step) or bool(step != 0)
    return counted and any(isinstance(v, Tensor) for k, v in state.items() if k != "step")


def is_fresh(state: Mapping[str, Any], group: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether dense states are as before a layer's first step; a count of 0, which users set, does not say so alone."""
    if has_history(state):
        return False
    # Adagrad's, which has one state. torch fills it with the default, whatever the group says.
    fills = {options.get("initial_accumulator_value", 0) for options in (group, defaults)}
    tensors = [local(x) for key, x in state.items() if isinstance(x, Tensor) and key != "step"]
    return all(any(bool((x == fill).all()) for fill in fills) for x in tensors)
