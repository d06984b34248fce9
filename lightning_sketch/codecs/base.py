"""The `Codec` interface: how one optimizer state of one layer is stored."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.codecs.shared import Sharing
from lightning_sketch.codecs.state import CodecState, StateSpec, Tensors, key_of
from lightning_sketch.sharding import Cut, Shard
from lightning_sketch.sharding.base import ACCELERATOR_BLOCKS

#: Types of options, in words.
_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text"}


class Codec(ABC):
    """How one state of one layer is stored. Subclasses are frozen dataclasses of validated options.

    A subclass is known to policies and checkpoints by the name of its class, from its definition on. One defined again
    in the same place, as in a notebook, takes the place of the former.

    Raises:
        TypeError: another class of this name is a codec already.
    """

    #: Every codec by its name.
    registry: ClassVar[dict[str, type[Codec]]] = {}

    #: Why this codec cannot hold a signed (first) moment, or None when it can.
    refuses_signed: ClassVar[str | None] = None
    #: Why this codec cannot hold a non-negative (second) moment, or None when it can.
    refuses_unsigned: ClassVar[str | None] = None
    #: Whether every element is stored by itself, or beside its neighbours alone: then any optimizer's state can be
    #: decoded, stepped by the optimizer itself, and encoded again.
    elementwise: ClassVar[bool] = False
    #: Whether the state is kept as torch keeps it.
    exact: ClassVar[bool] = False
    #: Whether there is no state at all.
    drops: ClassVar[bool] = False
    #: Whether the tensor ``table`` is linear in the state, and has its columns: then parts of it can be put together.
    joins_columns: ClassVar[bool] = False
    #: Into how many blocks the reference cuts a gradient on accelerators, at most: fewer where each takes many
    #: operations.
    accelerator_blocks: ClassVar[int] = ACCELERATOR_BLOCKS
    #: Block-sized tensors that are alive at once in the hungriest of its reference steps there.
    live_blocks: ClassVar[int] = 14
    #: Whether steps of several layers may be made together, under ``torch.vmap``.
    steps_together: ClassVar[bool] = True
    #: Whether rows without a gradient must be left alone, also under dense gradients.
    lazy: bool = False
    #: beta of a momentum of the update, kept beside this state; 0 for none.
    momentum: float = 0.0

    @property
    def needs_host(self) -> str | None:
        """What the host must read from the device in every step, in words; ``None`` for nothing."""
        return "looks for rows without a gradient (lazy=True)" if self.lazy else None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_") or cls.__name__ == "ElementwiseCodec":
            return  # bases
        other = Codec.registry.get(cls.__name__, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"a codec {cls.__name__} is defined in {other.__module__} already; checkpoints name codecs by their "
                "class, so choose another name"
            )
        Codec.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Check that options are of the types of their defaults; their values are for subclasses.

        Raises:
            ValueError: one is not, e.g. text where there should be a number.
        """
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, option.name), type(option.default)
            if kind not in _KINDS or type(value) is kind or (kind is float and type(value) is int):
                continue
            hint = ""
            if isinstance(value, str) and kind in (int, float):
                hint = " (YAML takes 1e-1 for text: write 1.0e-1)" if "e" in value.lower() else ", not text"
            raise ValueError(f"{type(self).__name__}({option.name}={value!r}): must be {_KINDS[kind]}{hint}")

    def check(self, spec: StateSpec) -> None:
        """Raise ValueError, naming layer and state, if this codec cannot hold that state."""
        reason = self.refuses_signed if spec.signed else self.refuses_unsigned
        if reason:
            raise ValueError(f"{type(self).__name__} cannot hold {spec.name} of {spec.fqn}: {reason}")

    @abstractmethod
    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        """Fresh tensors by suffix; the empty suffix is the state's own name, ``scale`` a 0-d tensor on the CPU."""

    @abstractmethod
    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        """The operations over ``optimizer.state[param]``."""

    @abstractmethod
    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        """For each stored tensor, by suffix, which dimension of the parameter each of its dimensions runs along.

        ``None`` for a dimension that runs along none. Where a parameter is sharded along a dimension that a tensor
        has, the tensor is sharded with it; a tensor that lacks it is another one on each rank, unless they share the
        state (`sharing`). A scale is left out.

        Args:
            ndim: number of dimensions of the parameter, a scalar counting as one row.
        """

    def sharing(self, shape: tuple[int, ...], cut: Cut) -> Sharing | None:
        """What ranks agree on in every step of a layer that is divided over them; ``None`` if each is on its own.

        Args:
            shape: global shape of the layer.
            cut: how it is divided.
        """
        return None

    def table_shape(self, shard: Shard) -> tuple[int, int] | None:
        """``(depth, width)`` of the sketch of whole rows that this codec keeps; ``None`` if it keeps none."""
        return None

    def row_table_shape(self, shard: Shard) -> tuple[int, int] | None:
        """``(depth, width)`` of the sketch of a number for each row; ``None`` if there is none."""
        return None

    def shares_buckets(self, shard: Shard) -> bool:
        """Whether rows, or a number of each, lie in fewer buckets than there are rows."""
        shape = self.table_shape(shard) or self.row_table_shape(shard)
        return shape is not None and shape[1] < shard.table_rows

    def fills_empty_rows(self, shard: Shard) -> bool:
        """Whether steps find anything but 0 in a row that never had a gradient."""
        return self.shares_buckets(shard)

    @property
    def decays_absent_rows(self) -> bool:
        """Whether rows that a sparse gradient lacks decay as under a dense one; torch's own states do not."""
        return not (self.elementwise or self.lazy)

    def wider(self, shard: Shard) -> Codec | None:
        """This codec with twice the buckets, or one for each row where that is smaller; ``None`` if rows share none.

        Twice exactly: then each bucket's rows go into two, and `widened` copies it to both.
        """
        return None

    def bind_momentum(self, spec: StateSpec, tensors: Tensors) -> CodecState | None:
        """The momentum of the update that is kept beside this state, if `momentum`."""
        return None

    def to_whole(self, shard: Shard, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """Put a shard's tensors of a state that ranks share in their places among those of the whole layer.

        Args:
            tensors: by suffix, without the scale.
            whole: the same of the whole layer (modified in place); zeros where nothing was put yet.
        """
        for suffix, value in tensors.items():
            whole[suffix][self._place(suffix, shard)] = value

    def from_whole(self, shard: Shard, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The shard's tensors, by suffix, of those of the whole layer."""
        return {suffix: value[self._place(suffix, shard)] for suffix, value in whole.items()}

    def _place(self, suffix: str, shard: Shard) -> tuple[slice, ...]:
        """Where in a tensor of the whole layer the shard's lies."""
        found: list[slice] = []
        for along in self.axes(max(1, len(shard.global_shape)))[suffix]:
            place = slice(None)
            if along == 0:
                place = slice(shard.row_offset, shard.row_offset + shard.local_rows)
            elif along == 1 and shard.part_shape is not None:
                start = shard.column_offset // max(1, math.prod(shard.part_shape[1:]))
                place = slice(start, start + shard.part_shape[0])
            found.append(place)
        return tuple(found)

    def nbytes(self, spec: StateSpec) -> int:
        """Bytes of the stored tensors. Nothing is allocated."""
        meta = dataclasses.replace(spec, device=torch.device("meta"))
        return sum(t.nbytes for t in self.allocate(meta).values() if isinstance(t, Tensor))

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, as checkpoints (``weights_only=True``) and YAML need."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"codec": type(self).__name__} | {
            k: v.to_dict() if isinstance(v, Codec) else v for k, v in options.items()
        }


def allocate(codec: Codec, spec: StateSpec) -> dict[str, Any]:
    """Fresh tensors under their keys in ``optimizer.state[param]``."""
    return {key_of(spec.name, suffix): value for suffix, value in codec.allocate(spec).items()}
