"""Tell the user of states that were encoded badly."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lightning_sketch.layers.record import RECORDS, LayerRecord
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.sharding import is_dtensor
from lightning_sketch.sharding.agree import is_rank_zero

logger = logging.getLogger(__name__)

#: Relative error of a state, ``||encoded - dense|| / ||dense||``, above which to warn. An empty state has 1: from 0.5
#: on it is not plain any more that training is better off with what was encoded than with nothing.
LOSSY = 0.5


def warn_of_lossy(optimizer: CompressedGroups, errors: Mapping[str, Mapping[str, float]]) -> None:
    """Warn once of all states whose relative error is above `LOSSY`.

    Not of dropped ones: that they are is announced at conversion. Whole layers are the same on all ranks, and rank zero
    speaks of them; of sharded ones every rank speaks of its own part.

    Args:
        errors: relative error of every state that was encoded just now, by layer and state.
    """
    shown = [record for group in optimizer.param_groups for record in group.get(RECORDS, ()) if record is not None]
    layers = map(LayerRecord.from_record, [*optimizer.compression.records, *shown])  # groups may have been decided anew
    codecs = {layer.fqn: layer.codecs for layer in layers}
    bad: list[str] = []
    for name, by_state in errors.items():
        # Parts in DeepSpeed's flat tensors are called fqn[start:end], and some are of layers that are not compressed.
        stored_in = codecs.get(name.partition("[")[0], {})
        bad += [
            f"{name}: {state} in {type(stored_in[state]).__name__}, relative error {error:.2g}"
            for state, error in by_state.items()
            if error > LOSSY and (codec := stored_in.get(state)) is not None and not codec.drops
        ]
    if bad and (is_rank_zero() or _is_sharded(optimizer)):
        # A warning, because Python shows those of loggers that nobody configured.
        logger.warning(
            "states were encoded with large errors, ||encoded - dense|| / ||dense||, and the next steps go by them:\n  "
            "%s\nChoose a milder codec (BFloat16, a lower compression), Drop for a first moment, or start these states "
            "afresh with reset_states(optimizer, layers=[...])",
            "\n  ".join(bad),
        )


def _is_sharded(optimizer: CompressedGroups) -> bool:
    groups = optimizer.param_groups
    return optimizer.compression.flat is not None or any(
        is_dtensor(param) for group in groups for param in group["params"]
    )
