"""Whether an engine's own loading will do for a checkpoint of sharded parameters, or its states must be moved."""

from __future__ import annotations

from lightning_sketch.checkpoints.contents import SavedLayer, SavedOptimizer
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.policy.recorded import policy_hint
from lightning_sketch.sharding import shard_of
from lightning_sketch.sharding.dtensor import sharding_of


def needs_resharding(optimizer: CompressedOptimizer, saved: SavedOptimizer) -> bool:
    """Whether `restore` has to load a checkpoint: it is plain, or of another number of shards.

    torch.distributed.checkpoint fails there, because it reads into tensors of the live optimizer's names and shapes.

    Args:
        optimizer: converted, of whole or DTensor parameters.

    Raises:
        ValueError: the checkpoint was written under another policy; the message names every layer and the reason.
    """
    problems: list[str] = []
    decided: list[LayerRecord] = []
    plain = False  # or in codecs that a monitor has replaced
    sharded: list[tuple[SavedLayer, LayerPart, int]] = []  # compressed then and now, with the number of shards now
    for group, names in zip(optimizer.param_groups, optimizer.compression.names, strict=True):
        for param, fqn, record in zip(group["params"], names, optimizer.records(group), strict=True):
            found, live = saved.layers.get(fqn), None if record is None else LayerRecord.from_record(record)
            decided += [] if live is None else [live.as_decided()]
            if found is None or found.layer is live is None:
                continue
            if found.layer is None:
                plain = True
            elif live is not None and found.layer.replaces(live):
                plain = True  # tables of other sizes, which `restore` takes
            elif live is not None and found.layer == live:
                sharded.append((found, LayerPart(live, shard_of(param, fqn)), sharding_of(param, fqn)[0]))
            else:
                kept = "compressed in the checkpoint, kept by the policy"
                problems.append(f"{fqn}: {kept if live is None else found.layer.difference(live)}")
    if problems:
        policy = optimizer.compression.policy
        was = [x.layer.as_decided() for x in saved.layers.values() if x.layer is not None]
        raise ValueError(
            "this checkpoint was written under another policy; nothing was changed.\n  "
            + "\n  ".join(problems)
            + "\nLoad it with the policy and seed it was written under."
            + policy_hint(was, decided, None if policy is None else policy.seed)
        )
    if plain or not sharded:
        return plain
    # All layers were sharded over as many ranks, so one says it.
    found, _, shards = max(sharded, key=lambda each: each[2])
    if any(len(sources) != shards for sources in found.states().values()):
        return True
    return shards > 1 and any(_agree_now_only(layer, part) for layer, part, _ in sharded)


def _agree_now_only(found: SavedLayer, part: LayerPart) -> bool:
    """Whether ranks share a state now of which each had its own when the checkpoint was written."""
    states = found.states()
    return any(source.shard.cut is None for state in part.sharing for source in states.get(state, ()))
