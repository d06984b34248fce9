"""What the steps of a tensor need beside its gradient, kept from one step to the next.

To find a layer's states, and to bind its codecs to them, takes longer than the step of a small layer. So it is done
once, and again whenever what was bound is another object: the parameter, a tensor of ``optimizer.state[param]``
(``load_state_dict``, offloading), or of another shape, dtype (``module.to()``) or order in memory; and when entries of
the state come or go (a dense state that a user assigned). Of memory only views are asked whether it is still the same
(flat tensors, DTensors). That is compared at every step. Numbers are not kept: hyperparameters come from the group and
scales from the state at every step, and kernels are given tensors; addresses of an earlier step only by `prepared`,
which compares them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_sketch.kernels import huge_pages
from lightning_sketch.layers.record import LayerPart, LayerRecord, part_of
from lightning_sketch.optimizer.bound import BoundPart
from lightning_sketch.optimizer.on_device import stay_on_device
from lightning_sketch.optimizer.prepared import Prepared
from lightning_sketch.sharding import is_dtensor, local
from lightning_sketch.sharding.fake import is_fake


class Bindings:
    """The bound parts of an optimizer's tensors. Neither copied nor pickled: another optimizer makes its own."""

    def __init__(self) -> None:
        self._kept: dict[int, _Binding] = {}
        #: Whether a step has looked at the gradients of kept layers.
        self.kept_checked = False
        #: The last step, if it can be made again.
        self.prepared: Prepared | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Let go of everything; tensors are bound anew."""
        self._kept.clear()
        self.kept_checked, self.prepared = False, None

    def keep_those_in(self, states: Mapping[Tensor, Any]) -> None:
        """Let go of tensors without a state: of layers that are gone, or whose states were dropped."""
        for key in [key for key, binding in self._kept.items() if binding.param not in states]:
            del self._kept[key]

    def part(self, record: str, param: Tensor) -> LayerPart:
        """What `part_of` says. Of a DTensor that takes long: while it is placed as it was bound, it is what it was."""
        kept = self._kept.get(id(param))
        if kept is not None and kept.place is not None and kept.place.holds(param):
            (part,) = kept.parts
            if part.layer is LayerRecord.from_record(record):
                return part
        return part_of(record, param)

    def find(
        self, param: Tensor, parts: Sequence[LayerPart], needed: Collection[str], tensors: Mapping[str, Any]
    ) -> list[BoundPart] | None:
        """The parts of `param` that `bind` bound to just these, or ``None`` if something is not what it was."""
        kept = self._kept.get(id(param))
        return kept.bound if kept is not None and kept.holds(param, parts, needed, tensors) else None

    def bind(
        self,
        param: Tensor,
        parts: Sequence[LayerPart],
        needed: Collection[str],
        group: Mapping[str, Any],
        tensors: dict[str, Any],
    ) -> list[BoundPart]:
        """Bind the parts of `param` to it and to its states.

        Args:
            needed: the states that hyperparameters ask for, which all parts have.
            tensors: ``optimizer.state[param]``.
        """
        on_device = stay_on_device(group, param, parts)
        bound = [BoundPart.bind(part, param, group, tensors, on_device=on_device) for part in parts]
        if param.device.type == "cpu":
            for tensor in (*(part.param for part in bound), *tensors.values()):
                if isinstance(tensor, Tensor):
                    huge_pages.move_there(tensor)
        if not is_fake(param):  # which has no address
            self._kept[id(param)] = _Binding(param, parts, needed, tensors, bound)
        return bound


class _Place:
    """Where a DTensor lies: what its part follows from."""

    __slots__ = ("_held", "_mesh", "_param", "_placements", "_shape")

    def __init__(self, param: Any) -> None:
        self._param, self._shape, self._held = param, param.shape, local(param).shape
        self._mesh, self._placements = param.device_mesh, param.placements

    def holds(self, param: Any) -> bool:
        """Whether `param` is that DTensor, and lies there still."""
        return (
            param is self._param
            and param.device_mesh is self._mesh
            and param.placements == self._placements
            and param.shape == self._shape
            and param.to_local().shape == self._held
        )


class _Binding:
    """Bound parts of one tensor, and what they were bound to."""

    # fmt: off
    __slots__ = (
        "_dtype", "_keys", "_needed", "_numbers", "_scales", "_shape", "_states", "_stride", "_tensors", "_views",
        "bound", "param", "parts", "place",
    )
    # fmt: on

    def __init__(
        self,
        param: Tensor,
        parts: Sequence[LayerPart],
        needed: Collection[str],
        tensors: dict[str, Any],
        bound: list[BoundPart],
    ) -> None:
        self.bound, self.param, self.parts = bound, param, parts
        self._needed, self._tensors, self._keys = needed, tensors, frozenset(tensors)
        self.place = _Place(param) if is_dtensor(param) else None
        memory = local(param)
        self._shape, self._dtype = memory.shape, memory.dtype
        # Rows of a flat tensor or of a DTensor are tensors of their own, which may be left behind: their distance from
        # the beginning of the memory, in bytes.
        self._stride, views = memory.stride(), [part.param for part in bound if part.param is not param]
        self._views = [(view, view.data_ptr() - memory.data_ptr()) for view in views]
        states = [(key, x) for key, x in tensors.items() if isinstance(x, Tensor)]
        self._numbers = [(key, x) for key, x in states if key == "step" or key.endswith("_scale")]
        self._scales = [] if bound[0].on_device else [x for key, x in self._numbers if key != "step"]
        others = [(key, x) for key, x in states if all(x is not number for _, number in self._numbers)]
        # Held weakly: memory must be free as soon as states are moved away from a device.
        self._states = [(key, weakref.ref(x), x.shape, x.dtype, x.is_contiguous()) for key, x in others]

    def holds(
        self, param: Tensor, parts: Sequence[LayerPart], needed: Collection[str], tensors: Mapping[str, Any]
    ) -> bool:
        """Whether all is still what was bound."""
        if param is not self.param or tensors is not self._tensors or parts != self.parts or needed != self._needed:
            return False
        memory = param if self.place is None else local(param)
        if memory.shape != self._shape or memory.dtype != self._dtype:
            return False
        if self._views:
            address = memory.data_ptr()
            if memory.stride() != self._stride or any(x.data_ptr() - address != at for x, at in self._views):
                return False
        if tensors.keys() != self._keys:
            return False  # a dense state was assigned beside what its codec stores, or an entry is gone
        for key, number in self._numbers:  # put right when they were bound
            if tensors[key] is not number:
                return False
        if any(not 0 < scale.item() < math.inf for scale in self._scales):
            return False  # overwritten in place: to bind it anew says so
        for key, reference, shape, dtype, contiguous in self._states:
            # Kernels work on what is compared here of their memory.
            tensor = reference()
            if tensor is None or tensors[key] is not tensor or tensor.shape != shape:
                return False
            if tensor.dtype != dtype or tensor.is_contiguous() is not contiguous:
                return False
        return True
