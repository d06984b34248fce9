"""Dense states into codecs that several ranks share: each adds what it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.codecs import Encoding
from lightning_sketch.layers.record import LayerPart, compute_dtype
from lightning_sketch.layers.shared import Buffer, SharedLayer
from lightning_sketch.sharding import local
from lightning_sketch.sharding.agree import reduce_together


def encode_together(
    layers: Sequence[SharedLayer],
    parts: Sequence[tuple[LayerPart, Mapping[str, Encoding]]],
    param: Tensor,
    group: Mapping[str, Any],
    ranks: Sequence[Any],
) -> None:
    """Have ranks agree on the states that they share, each of which encodes what it holds. Collective.

    Args:
        layers: the layers; the same on all ranks.
        parts: this rank's parts of them, with the states of each by name; those that are shared are begun.
        param: the tensor that they lie in.
        group: its parameter group.
        ranks: their process groups; see `reduce_together`.

    Raises:
        RuntimeError: another rank did not come.
    """
    device = local(param).device
    shared = [(encodings[name], part, name) for part, encodings in parts for name in part.sharing if name in encodings]
    if group.get("initial_accumulator_value"):  # which all values are less by, unless one of any rank is below it
        least = torch.tensor([min((encoding.fill for encoding, *_ in shared), default=math.inf)], device=device)
        reduce_together(least.neg_(), ranks, largest=True)
        for encoding, *_ in shared:
            encoding.fill = -least.item()
    buffer = Buffer(layers, device, compute_dtype(param))
    for encoding, part, name in shared:
        state = encoding.begin()
        state.share(buffer.slots[part.layer.fqn].of_shard(part.shard, name))
        for block, values in encoding.values():
            state.observe(block, values)
        state.finish_observing(None)
    buffer.reduce(ranks)
    for encoding, *_ in shared:
        begun = encoding.state
        if begun is not None and begun.observes_agreed:
            for block, values in encoding.values():
                begun.observe_agreed(block, values)
