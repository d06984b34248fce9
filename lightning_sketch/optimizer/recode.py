"""Store states of layers by other codecs, in place, in the middle of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_sketch.codecs import Codec, transcode, widened
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.optimizer.compression import Compression
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.sharding.agree import any_rank


def wider_codecs(part: LayerPart) -> dict[str, Codec]:
    """For the states of a layer whose rows share buckets, codecs with twice as many; see `Codec.wider`."""
    found = {name: codec.wider(part.shard) for name, codec in part.layer.persistent_codecs().items()}
    return {name: codec for name, codec in found.items() if codec is not None}


def change_codecs(
    optimizer: CompressedGroups, changes: Mapping[str, Mapping[str, Codec]], *, wider: bool = False
) -> None:
    """Store states of layers, by name, by other codecs. The layers' records say so from now on. Collective.

    Args:
        optimizer: of parameters, whole or sharded by rows.
        changes: by layer and state.
        wider: whether each codec is `Codec.wider` of the one that it replaces.

    Raises:
        ValueError: it failed on some rank, perhaps for lack of memory. Nothing was changed then, on any rank.
    """
    made: list[tuple[dict[str, Any], int, LayerRecord, dict[str, Any], dict[str, Any]]] = []

    def make() -> bool:
        for group, param, (part, *_) in optimizer.compressed_tensors():
            if codecs := changes.get(part.layer.fqn):
                state = optimizer.state.get(param, {})
                index = next(i for i, other in enumerate(group["params"]) if other is param)
                new = _changed(part, param, group, state, codecs, wider=wider) if state else {}
                made.append((group, index, part.layer.with_codecs(codecs), state, new))
        return bool(made)

    any_rank(make)  # all succeed, or none goes on
    for group, index, layer, state, new in made:
        state.update(new)
        for key in [key for key, value in new.items() if value is None]:
            del state[key]
        optimizer.compression.replace_record(group, index, layer.to_record())
    optimizer.compression.bindings.clear()


def _changed(
    part: LayerPart,
    param: Tensor,
    group: Mapping[str, Any],
    state: dict[str, Any],
    codecs: Mapping[str, Codec],
    *,
    wider: bool,
) -> dict[str, Any]:
    """New entries of ``optimizer.state[param]``; ``None`` for those that go."""
    entries: dict[str, Any] = {}
    for name, codec in codecs.items():
        old, spec = part.layer.codecs[name], part.spec(name, param, group)
        entries |= dict.fromkeys(part.layout(param)[name])
        entries |= widened(old, codec, spec, state) if wider else transcode(old, codec, spec, state)
    return entries


class ReplacedRecords:
    """Records of a checkpoint's layers whose codecs a monitor had replaced, there or here.

    They are gathered while a checkpoint is looked through, and put in place when all of it was found to fit.
    """

    def __init__(self) -> None:
        self._found: list[tuple[dict[str, Any], int, str]] = []

    def choose(self, saved: str | None, live: str, group: dict[str, Any], index: int) -> str:
        """The record by which a layer loads: `saved`, if it differs from `live` in replaced codecs alone, else `live`.

        Args:
            saved: the checkpoint's; ``None`` if the layer is not compressed there.
            live: that of the parameter at `index` in `group`.
        """
        try:
            if saved is None or not LayerRecord.from_record(saved).replaces(LayerRecord.from_record(live)):
                return live
        except ValueError:  # of another format version: whoever loads it names it
            return live
        self._found.append((group, index, saved))
        return saved

    def put(self, compression: Compression) -> None:
        """Put the records that were chosen in the places of the live ones."""
        for group, index, record in self._found:
            compression.replace_record(group, index, record)
