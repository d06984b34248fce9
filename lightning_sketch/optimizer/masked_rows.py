"""Rows that never get a gradient (padding, masks) do not stay where they are under a sketched first moment: say so.

A sketch answers for every row, also for one that was never inserted: with what other rows left in its buckets. That
moves the row, unless its second moment is zero, which it is only where that is not sketched, too, and has no floor.

The states cannot tell which rows had a gradient. A bit for each row would be a further state to save, shard and move,
and to set it means reading all of a dense gradient once more at every step: of 65,536 x 256 on one thread, in plain
PyTorch, that took two thirds as long as the whole step of two sketches. And `lazy` does it already, for those who need
it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from torch import nn

from lightning_sketch.codecs import Codec
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.layers.roles import NamedLayer, named_layers
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.sharding import Shard

logger = logging.getLogger(__name__)


def warn_of_masked_rows(model: nn.Module, optimizer: CompressedGroups) -> None:
    """Log a warning for every table that has rows without gradients, as far as can be seen, and would move them."""
    named = named_layers(model)
    for _, layer, param in optimizer.compressed_layers():
        if id(param) not in named or not moves_rows_without_gradient(layer):
            continue
        if reasons := list(_reasons(named[id(param)])):
            logger.warning(
                "%s has %s, and its first moment is sketched: a row whose gradient is zero still moves, by what other "
                "rows left in its buckets. Give its CountSketch lazy=True, which leaves rows without a gradient alone, "
                "or choose BFloat16() or Drop() for the first moment",
                layer.fqn,
                " and ".join(reasons),
            )


def moves_rows_without_gradient(layer: LayerRecord) -> bool:
    """Whether a row that never had a gradient moves under dense gradients, but for weight decay."""
    if layer.lazy:
        return False
    shard = Shard.whole(layer.shape)
    states: Mapping[str, Codec] = layer.codecs
    if not any(layer.signed[state] and codec.fills_empty_rows(shard) for state, codec in states.items()):
        return False
    # Updates are zero where the second moment is, but for RMSprop's momentum, which is of updates.
    second = [codec for state, codec in states.items() if not layer.signed[state]]
    momentum = "momentum_buffer" in states and states["momentum_buffer"].fills_empty_rows(shard)
    return momentum or all(codec.fills_empty_rows(shard) for codec in second)


def _reasons(layer: NamedLayer) -> Iterator[str]:
    """Signs of rows without a gradient."""
    # Every use must spare the row: a head that is tied to the table gives it a gradient. Sparse gradients lack it, and
    # so it is not stepped.
    padding = {getattr(owner, "padding_idx", None) for owner in layer.owners}
    if len(padding) == 1 and None not in padding and not layer.sparse:
        yield f"padding_idx={padding.pop()}"
    of_module = any(owner._backward_hooks or owner._backward_pre_hooks for owner in layer.owners)
    param = layer.param
    if of_module or param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
        yield "a gradient hook, which may mask rows"
