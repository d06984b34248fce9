"""A compressed layer: what was decided for it, and the part of it that lies in one tensor of the optimizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_sketch import codecs as codec_lib
from lightning_sketch.codecs import Codec, StateSpec, codec_from
from lightning_sketch.codecs.shared import Sharing
from lightning_sketch.layers.shared import SharedLayer
from lightning_sketch.rules import Count, StateDef, UpdateRule
from lightning_sketch.sharding import Cut, Shard, global_shape, is_dtensor, local, shard_of
from lightning_sketch.sharding.base import ACCELERATOR_BLOCKS
from lightning_sketch.sharding.gradient import RowGradient, row_gradient

#: Version of the stored layout; a checkpoint of another version is refused.
FORMAT_VERSION = 1

#: Key in every parameter group: for each parameter the record of its `LayerRecord`, or None if it is kept. By position,
#: because trainers replace parameters but keep their order; strings, because checkpoints load with weights_only=True.
RECORDS = "compression"

#: Fields of a `LayerRecord` that a checkpoint's and the live one must have alike, and what errors call them.
_COMPARED = (
    ("shape", "shape"), ("codecs", "codecs"), ("seed", "hash seed"), ("signed", "states"),
    ("stock_count", "optimizer's step count"),
)  # fmt: skip


@dataclass(frozen=True)
class LayerRecord:
    """What the policy decided for one parameter. Immutable; a string once written as a record.

    Args:
        fqn: the parameter's name.
        seed: the layer's hash seed.
        shape: global shape of the parameter.
        signed: torch's names of the states it keeps, and whether each may be negative.
        codecs: codec of every state.
        stock_count: where the optimizer's own step updates the layer (there is no rule for its class): how it keeps
            ``step``. Its entry in ``optimizer.state`` then holds states beside those of `codecs`, as that step left
            them. ``None`` where one of our rules updates it.
        decided: the codecs that the policy decided, where a monitor has put others in their place.
    """

    fqn: str
    seed: int
    shape: tuple[int, ...]
    signed: Mapping[str, bool]
    codecs: Mapping[str, Codec]
    stock_count: Count | None = None
    decided: Mapping[str, Codec] | None = None

    @classmethod
    def make(
        cls,
        fqn: str,
        seed: int,
        param: Tensor,
        states: Iterable[StateDef],
        codecs: Mapping[str, Codec],
        stock_count: Count | None = None,
    ) -> LayerRecord:
        return cls(fqn, seed, global_shape(param), {s.name: s.signed for s in states}, codecs, stock_count)

    @property
    def compressed(self) -> bool:
        """Whether any state is not kept as it is."""
        return any(not codec.exact for codec in self.codecs.values())

    @property
    def lazy(self) -> bool:
        return any(codec.lazy for codec in self.codecs.values())

    @property
    def most_blocks(self) -> int:
        """Into how many blocks the reference cuts a gradient on accelerators, at most."""
        return min((codec.accelerator_blocks for codec in self.codecs.values()), default=ACCELERATOR_BLOCKS)

    def persistent_codecs(self) -> dict[str, Codec]:
        """The codecs that store anything: all but `Drop`."""
        return {state: codec for state, codec in self.codecs.items() if not codec.drops}

    def with_codecs(self, codecs: Mapping[str, Codec]) -> LayerRecord:
        """This layer with other codecs of some of its states, in the middle of training."""
        return dataclasses.replace(self, codecs={**self.codecs, **codecs}, decided=self.decided or self.codecs)

    def as_decided(self) -> LayerRecord:
        """This layer as the policy decided it."""
        return self if self.decided is None else dataclasses.replace(self, codecs=self.decided, decided=None)

    def replaces(self, live: LayerRecord) -> bool:
        """Whether a checkpoint's layer, this one, is the live one but for codecs that a monitor has replaced."""
        return self != live and self.as_decided() == live.as_decided()

    def sharing(self, cut: Cut) -> dict[str, Sharing]:
        """What ranks over which the layer is divided agree on in every step, by state."""
        found = {state: codec.sharing(self.shape, cut) for state, codec in self.persistent_codecs().items()}
        return {state: sharing for state, sharing in found.items() if sharing is not None}

    def lacking(self, rule: UpdateRule, group: Mapping[str, Any]) -> list[str]:
        """States that the rule keeps under these hyperparameters, and the layer was compressed without."""
        if self.stock_count is not None:
            return []  # its optimizer makes what it wants, and that is then kept
        return [state.name for state in rule.states(group) if state.name not in self.codecs]

    def difference(self, live: LayerRecord) -> str | None:
        """What of a checkpoint's layer, this one, is not as in the live one."""
        for field, word in _COMPARED:
            if getattr(self, field) != getattr(live, field):
                was, now = (
                    list(x) if isinstance(x, tuple) else x for x in (getattr(self, field), getattr(live, field))
                )
                return f"its {word} in the checkpoint is {was}, here {now}"
        return None if self.fqn == live.fqn else f"it is {self.fqn} in the checkpoint"

    def to_record(self) -> str:
        """JSON for ``param_groups``: one string, because torch.distributed.checkpoint stores every primitive apart."""
        fields = {
            "version": FORMAT_VERSION,
            "fqn": self.fqn,
            "seed": self.seed,
            "shape": list(self.shape),
            "signed": dict(self.signed),
            "codecs": {state: codec.to_dict() for state, codec in self.codecs.items()},
        }
        if self.stock_count is not None:
            fields["stock_count"] = self.stock_count
        if self.decided is not None:
            fields["decided"] = {state: codec.to_dict() for state, codec in self.decided.items()}
        return json.dumps(fields)

    @staticmethod
    def from_record(record: str) -> LayerRecord:
        """The layer of a record.

        Raises:
            ValueError: the record is damaged, or of another format version.
        """
        return _parse(record)


@functools.lru_cache(maxsize=1 << 16)  # asked for at every step
def _parse(record: str) -> LayerRecord:
    try:
        fields = json.loads(record)
        version = fields.get("version")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"not a record of a compressed layer: {record!r:.200}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{fields.get('fqn')}: written by format version {version}, this is {FORMAT_VERSION}")
    try:
        return LayerRecord(
            fqn=str(fields["fqn"]),
            seed=int(fields["seed"]),
            shape=tuple(map(int, fields["shape"])),
            signed={str(state): bool(signed) for state, signed in fields["signed"].items()},
            codecs=_codecs_from(fields["codecs"]),
            stock_count=_count_from(fields.get("stock_count")),
            decided=None if fields.get("decided") is None else _codecs_from(fields["decided"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the record of {fields.get('fqn')} is damaged: {error}") from error


def _codecs_from(fields: Mapping[str, Any]) -> dict[str, Codec]:
    return {str(state): codec_from(value) for state, value in fields.items()}


def _count_from(value: Any) -> Count | None:
    if value is not None and value not in get_args(Count):
        raise ValueError(f"stock_count is {value!r}")
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LayerPart:
    """The part of a layer that lives in one tensor of the optimizer, with its states.

    Args:
        layer: what was decided for the whole layer.
        shard: which part of the layer it is.
        span: which elements of the optimizer's flat tensor; ``None`` for all of its tensor.
        prefix: in front of its keys in ``optimizer.state[param]``; empty unless parts share a tensor.
    """

    layer: LayerRecord
    shard: Shard
    span: slice | None = None
    prefix: str = ""

    def rows(self, tensor: Tensor) -> Tensor:
        """View this part of the optimizer's tensor, or of one like it, as ``[local_rows, *row_shape]``."""
        held = local(tensor)
        return self.shard.as_rows(held if self.span is None else held.view(-1)[self.span])

    def gradient(self, grad: Tensor) -> RowGradient:
        """This part of the gradient of the optimizer's tensor.

        Raises:
            TypeError: its layout is not supported.
        """
        if self.span is None:
            return row_gradient(local(grad), self.shard, self.layer.fqn)
        return RowGradient(self.shard, None, self.rows(grad))

    def no_gradient(self, param: Tensor) -> RowGradient:
        """A gradient without rows, of this part of the optimizer's `param`."""
        held = local(param)
        rows = torch.empty(0, dtype=torch.int64, device=held.device)
        return RowGradient(self.shard, rows, held.new_empty(0, *self.shard.row_shape))

    @functools.cached_property
    def sharing(self) -> dict[str, Sharing]:
        """What of its states other ranks share; see `LayerRecord.sharing`."""
        return {} if self.shard.cut is None else self.layer.sharing(self.shard.cut)

    @functools.cached_property
    def shared(self) -> tuple[SharedLayer, ...]:
        """Where this part is a parameter's, divided by rows or columns: its layer, if ranks share states of it."""
        if not self.sharing or self.shard.cut is None:
            return ()
        return (SharedLayer(self.layer.fqn, self.layer.shape, self.shard.cut, self.sharing),)

    def check_shape(self) -> None:
        """Raise ValueError if the parameter is no longer of the shape that the layer's states were laid out for."""
        if self.shard.global_shape != self.layer.shape:
            raise ValueError(
                f"{self.layer.fqn} now has shape {list(self.shard.global_shape)}, but its states were laid out for "
                f"{list(self.layer.shape)}; compress an optimizer of the new parameters, or call "
                "resize_states(optimizer, model), which keeps the states of the rows that stay"
            )

    def spec(self, state: str, param: Tensor, group: Mapping[str, Any]) -> StateSpec:
        """How a state is to be stored; `param` gives dtype and device."""
        signed = self.layer.signed[state]
        return StateSpec(
            name=self.prefix + state,
            fqn=self.layer.fqn,
            signed=signed,
            shard=self.shard,
            seed=self.layer.seed,
            dtype=compute_dtype(param),
            param_dtype=param.dtype,
            device=param.device,
            fill=float(group.get("initial_accumulator_value", 0.0)) if not signed else 0.0,
        )

    def scales(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The scales among the entries of ``optimizer.state[param]`` or of a checkpoint, by key, as steps read them.

        Raises:
            ValueError: one is no finite number above 0.
        """
        keys = [codec_lib.key_of(self.prefix + name, "scale") for name in self.layer.persistent_codecs()]
        return {
            key: codec_lib.scale_tensor(state[key], f"{key.removeprefix(self.prefix)} of {self.layer.fqn}")
            for key in keys
            if key in state
        }

    def layout(self, param: Tensor) -> Mapping[str, Mapping[str, Any]]:
        """How every state is stored beside `param`: for each its entries by key, tensors on the meta device
        (scales on the CPU).

        Made once for every dtype.
        """
        if (found := self._layouts.get(param.dtype)) is None:
            found = self._layouts[param.dtype] = {}
            for state, codec in self.layer.codecs.items():
                spec = dataclasses.replace(self.spec(state, param, {}), device=torch.device("meta"))
                found[state] = codec_lib.allocate(codec, spec)
        return found

    @functools.cached_property
    def _layouts(self) -> dict[torch.dtype, dict[str, dict[str, Any]]]:
        return {}

    def allocate(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The initial entries of ``optimizer.state[param]``, but its ``step``, on the parameter's device."""
        tensors: dict[str, Any] = {}
        for state, codec in self.layer.persistent_codecs().items():
            tensors |= codec_lib.allocate(codec, self.spec(state, param, group))
        return tensors


def part_of(record: str, param: Tensor) -> LayerPart:
    """The part of a recorded layer that `param` holds: all of it, or a DTensor's local rows or columns."""
    if is_dtensor(param):
        return _part(record, shard_of(param, LayerRecord.from_record(record).fqn))
    return _whole_part(record, param.shape)


# Parts are asked for at every step; they are made of nothing but their arguments, so each is made once.
@functools.lru_cache(maxsize=1 << 16)
def _part(record: str, shard: Shard) -> LayerPart:
    return LayerPart(LayerRecord.from_record(record), shard)


@functools.lru_cache(maxsize=1 << 16)
def _whole_part(record: str, shape: tuple[int, ...]) -> LayerPart:
    return _part(record, Shard.whole(tuple(shape)))


def compute_dtype(param: Tensor) -> torch.dtype:
    """Arithmetic is float32, and float64 for float64 parameters."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32
