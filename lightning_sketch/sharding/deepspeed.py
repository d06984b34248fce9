"""DeepSpeed: which elements of which parameter lie where in the tensors that it hands to a client optimizer.

Under ZeRO an optimizer never sees the model's parameters, but one-dimensional fp32 tensors into which DeepSpeed has
copied pieces of them. `read_layout` maps every element back from DeepSpeed's own records of what lies where, and checks
that these are complete, free of contradictions, and true of the memory they describe. Everything goes by attribute and
class name: DeepSpeed is never imported.

``param._hp_mapping``, DeepSpeed's public answer to the same question, is not used: it points to other parameters'
elements under ``round_robin_gradients``, and has no offset inside the parameter.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor, nn

from lightning_sketch.sharding.wrapper import refuse_format

# Every attribute read below was compared with this version's source, and is tested against it.
TESTED_VERSION = "0.19.8"


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of elements of one model parameter inside a flat tensor of this rank.

    Args:
        param: the model's parameter. Its ``.data`` may be empty under ZeRO-3.
        shape: its logical shape.
        start: first element in the flat tensor.
        length: number of elements, at least one.
        offset: first element within the parameter, flattened in row-major order.
    """

    param: nn.Parameter
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


@dataclass(frozen=True, eq=False)
class FlatLayout:
    """The segments of every tensor that the client optimizer sees on this rank.

    Args:
        engine: ``"ZeRO-1/2"``, ``"ZeRO-3"``, ``"BF16_Optimizer"`` or ``"FP16_UnfusedOptimizer"``.
        tensors: each tensor with its segments sorted by start; what they leave free is alignment padding.
        params_on_any_rank: for each tensor, all parameters of which any rank holds a piece in its counterpart.
        borders: for each of these, before which of its elements, flattened, the piece of one rank ends and that of the
            next begins.
        ranks: the process group over which all of them are divided; ``None`` if every rank holds everything.
    """

    engine: str
    tensors: list[tuple[Tensor, list[Segment]]]
    params_on_any_rank: list[list[nn.Parameter]]
    borders: list[list[tuple[int, ...]]]
    ranks: Any


def read_layout(wrapper: Any) -> FlatLayout:
    """Read which elements of which parameter lie where in the tensors that the client of `wrapper` steps.

    No rank communicates: each works out what all of them hold, and checks that every element of every parameter is held
    exactly once, that this rank's segments fit into its tensors without overlap, that the parameters lie in DeepSpeed's
    own buffer where its records say, and that the client has no tensor beside these.

    Args:
        wrapper: what `find_wrapper` or `wrapper_of` found.

    Raises:
        RuntimeError: DeepSpeed does not keep the records this was written for, they fail a check, or it runs in a mode
            that is not supported (NVMe offload, ZenFlow, SuperOffload, expert parallelism, elastic checkpoints). The
            message names the parameter, DeepSpeed's version and what to do.
    """
    name = type(wrapper).__name__
    if name not in _READERS:
        _refuse(wrapper, f"{name} is not among {', '.join(_READERS)}", "choose one of these, or stage 0 in fp32")
    if getattr(wrapper, "zenflow", False):
        _refuse(wrapper, "ZenFlow steps parameters past the client optimizer", "turn zero_optimization.zenflow off")
    if getattr(wrapper, "elastic_checkpoint", False):
        refuse_format("elastic", "zero_optimization.elastic_checkpoint")
    engine, reader = _READERS[name]
    buffers = reader(wrapper)
    if not any(buffer.params for buffer in buffers):
        _refuse(wrapper, "it holds no parameter", "call after deepspeed.initialize, with a client optimizer")
    group = _common_group(wrapper, buffers)
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    for buffer in buffers:
        _check_coverage(wrapper, buffer, world)
        _check_memory(wrapper, buffer)
    _check_distinct(wrapper, buffers)
    _check_client(wrapper, [buffer.flat for buffer in buffers])
    tensors = [(buffer.flat, buffer.segments(rank)) for buffer in buffers]
    params, borders = [buffer.params for buffer in buffers], [buffer.borders(world) for buffer in buffers]
    return FlatLayout(engine, tensors, params, borders, group if world > 1 else None)


Piece = tuple[int, int, int, int]  # which parameter, start in the flat tensor, length, offset in the parameter


@dataclass(frozen=True)
class _Buffer:
    """One flat tensor as DeepSpeed's records have it.

    Args:
        flat: this rank's tensor.
        params: the parameters that it holds pieces of, on any rank.
        shapes: their logical shapes.
        group: the process group it is partitioned over, or None for a whole parameter.
        pieces: the pieces that a given rank holds, in order.
        expected_addresses: per parameter, a tensor and where its memory must start; see `_check_memory`.
    """

    flat: Tensor
    params: list[nn.Parameter]
    shapes: list[tuple[int, ...]]
    group: Any
    pieces: Callable[[int], Iterable[Piece]]
    expected_addresses: list[tuple[Tensor, int]]

    def segments(self, rank: int) -> list[Segment]:
        return [Segment(self.params[i], self.shapes[i], *place) for i, *place in self.pieces(rank)]

    def borders(self, world: int) -> list[tuple[int, ...]]:
        """Where in each parameter pieces begin, but the first."""
        found: list[set[int]] = [set() for _ in self.params]
        for rank in range(world):
            for i, _, _, offset in self.pieces(rank):
                found[i].add(offset)
        return [tuple(sorted(offsets - {0})) for offsets in found]


def _read_zero_1_2(wrapper: Any) -> list[_Buffer]:
    # `bit16_groups` has the user's order; the `round_robin` lists have the order in memory, in every configuration.
    flats = _get(wrapper, "single_partition_of_fp32_groups")
    groups = _get(wrapper, "round_robin_bit16_groups")
    # Before 0.19.7 nothing could lie between parameters, and no offsets were kept.
    offsets = getattr(wrapper, "round_robin_bit16_offsets", None) or [None] * len(groups)
    return _end_to_end(wrapper, flats, groups, offsets, _get(wrapper, "bit16_groups_flat"))


def _read_bf16(wrapper: Any) -> list[_Buffer]:
    flats, groups = _get(wrapper, "fp32_groups_flat_partition"), _get(wrapper, "bf16_groups")
    return _end_to_end(wrapper, flats, groups, [None] * len(groups), _get(wrapper, "bf16_groups_flat"))


def _end_to_end(
    wrapper: Any,
    flats: Sequence[Tensor],
    groups: Sequence[Sequence[nn.Parameter]],
    offsets: Sequence[Sequence[int] | None],
    wholes: Sequence[Tensor],
) -> list[_Buffer]:
    """Parameters laid end to end in `wholes`, of which every rank steps an equal share."""
    ranks = _get(wrapper, "real_dp_process_group")
    _check_lengths(wrapper, flats, groups, offsets, wholes, ranks)
    buffers = []
    for flat, params, known, whole, group in zip(flats, groups, offsets, wholes, ranks, strict=True):
        sizes, shapes = [p.numel() for p in params], [tuple(p.shape) for p in params]
        starts = list(known) if known is not None else starts_of(sizes)
        group = _world_if_none(group)
        if len(starts) != len(sizes) or flat.numel() * dist.get_world_size(group) != whole.numel():
            _contradiction(wrapper, f"{len(starts)} offsets for {len(sizes)} parameters, or shares of unequal size")
        pieces = partial(window, starts, sizes, flat.numel())
        expected_addresses = _addresses([p.data for p in params], whole, starts)
        buffers.append(_Buffer(flat, list(params), shapes, group, pieces, expected_addresses))
    return buffers


def window(starts: list[int], sizes: list[int], share: int, rank: int) -> Iterable[Piece]:
    """Cut the window of `share` elements that is `rank`'s out of runs of `sizes` elements at ascending `starts`."""
    begin, end = rank * share, (rank + 1) * share
    for i in range(max(0, bisect_right(starts, begin) - 1), len(starts)):
        if starts[i] >= end:
            return
        first, last = max(starts[i], begin), min(starts[i] + sizes[i], end)
        if first < last:
            yield i, first - begin, last - first, first - starts[i]


def _read_zero_3(wrapper: Any) -> list[_Buffer]:
    if getattr(wrapper, "swap_optimizer", False) or getattr(wrapper, "params_in_nvme_and_cpu", False):
        _refuse(wrapper, "NVMe offload swaps states by the parameters' size", "offload to the CPU instead")
    flats, groups = _get(wrapper, "fp32_partitioned_groups_flat"), _get(wrapper, "fp16_groups")
    shares = _get(wrapper, "fp16_partitioned_groups_flat")
    _check_lengths(wrapper, flats, groups, shares)
    buffers = []
    for flat, params, share in zip(flats, groups, shares, strict=True):
        ranks = [_get(p, "ds_process_group", wrapper) for p in params]
        if any(group != ranks[0] for group in ranks):
            _refuse(wrapper, "a sub-group is partitioned over several process groups", "turn expert parallelism off")
        shapes = [tuple(_get(p, "ds_shape", wrapper)) for p in params]
        sizes = [math.prod(shape) for shape in shapes]
        partitions = [_get(p, "ds_tensor", wrapper) for p in params]
        parts = [int(_get(p, "ds_numel", wrapper)) for p in partitions]  # elements of a share, padding included
        if sum(parts) != flat.numel():
            _contradiction(wrapper, f"shares of {sum(parts)} elements in a tensor of {flat.numel()}")
        pieces = partial(cut, starts_of(parts), sizes, parts)
        expected_addresses = _addresses(partitions, share, starts_of(parts))
        buffers.append(_Buffer(flat, list(params), shapes, _world_if_none(ranks[0]), pieces, expected_addresses))
    return buffers


def cut(starts: list[int], sizes: list[int], parts: list[int], rank: int) -> Iterable[Piece]:
    """Cut every run of `sizes` elements into `parts` of its own, laid at `starts`; beyond its end there is padding."""
    for i, (start, size, part) in enumerate(zip(starts, sizes, parts, strict=True)):
        held = min(part, size - rank * part)
        if held > 0:
            yield i, start, held, rank * part


def _whole(numel: int, _rank: int) -> Iterable[Piece]:
    yield 0, 0, numel, 0


def _read_unfused(wrapper: Any) -> list[_Buffer]:
    lists, groups = _get(wrapper, "fp32_groups"), _get(wrapper, "fp16_groups")
    _check_lengths(wrapper, lists, groups)
    buffers = []
    for flats, params in zip(lists, groups, strict=True):
        _check_lengths(wrapper, flats, params)
        for flat, param in zip(flats, params, strict=True):
            if flat.shape != param.shape:
                _contradiction(wrapper, f"a copy of shape {tuple(flat.shape)} for {_name(wrapper, param)}")
            buffers.append(_Buffer(flat, [param], [tuple(param.shape)], None, partial(_whole, param.numel()), []))
    return buffers


# By exact class: a subclass may hand its client other tensors than its base (ZenFlow and SuperOffload do).
_READERS: dict[str, tuple[str, Callable[[Any], list[_Buffer]]]] = {
    "DeepSpeedZeroOptimizer": ("ZeRO-1/2", _read_zero_1_2),
    "DeepSpeedZeroOptimizer_Stage3": ("ZeRO-3", _read_zero_3),
    "BF16_Optimizer": ("BF16_Optimizer", _read_bf16),
    "FP16_UnfusedOptimizer": ("FP16_UnfusedOptimizer", _read_unfused),
}


def _check_coverage(wrapper: Any, buffer: _Buffer, world: int) -> None:
    """Every element of every parameter exactly once over the ranks, and no two pieces of a rank on top of each other.

    Both ways of partitioning give the front of a parameter to an earlier rank than its back, so it is enough that each
    piece begins where the one before it ended.
    """
    covered = [0] * len(buffer.params)
    for rank in range(world):
        end = 0
        for i, start, length, offset in buffer.pieces(rank):
            if start < end or start + length > buffer.flat.numel():
                name = _name(wrapper, buffer.params[i])
                _contradiction(wrapper, f"{name} lies over another parameter or past the end of rank {rank}'s tensor")
            if offset != covered[i]:
                name = _name(wrapper, buffer.params[i])
                _contradiction(wrapper, f"rank {rank} continues {name} at element {offset} instead of {covered[i]}")
            end, covered[i] = start + length, offset + length
    for param, shape, count in zip(buffer.params, buffer.shapes, covered, strict=True):
        numel = int(getattr(param, "ds_numel", param.numel()))
        if not count == numel == math.prod(shape):
            _contradiction(wrapper, f"{count} of the {numel} elements of {_name(wrapper, param)} {shape} are held")


def _check_memory(wrapper: Any, buffer: _Buffer) -> None:
    """DeepSpeed makes the low-precision parameters views into its buffer, of which `flat` is the fp32 copy.

    So their addresses say independently of any record what lies where.
    """
    for param, (held, address) in zip(buffer.params, buffer.expected_addresses, strict=bool(buffer.expected_addresses)):
        if held.numel() and held.data_ptr() != address:
            what = f"{_name(wrapper, param)} does not lie in DeepSpeed's buffer where its records say"
            _contradiction(wrapper, f"{what} (or is offloaded: call engine.reload_states() first)")


def _check_distinct(wrapper: Any, buffers: list[_Buffer]) -> None:
    seen: set[int] = set()
    for buffer in buffers:
        for param in buffer.params:
            if id(param) in seen:
                _contradiction(wrapper, f"{_name(wrapper, param)} appears twice")
            seen.add(id(param))


def _check_client(wrapper: Any, flats: list[Tensor]) -> None:
    """Between steps, and in ZeRO-1/2 and -3 also during one, the client's groups hold only some of the tensors."""
    known = {id(flat) for flat in flats}
    for group in _get(wrapper, "optimizer").param_groups:
        for tensor in group["params"]:
            if id(tensor) not in known:
                _contradiction(wrapper, f"its client steps an unknown tensor of shape {tuple(tensor.shape)}")


def _common_group(wrapper: Any, buffers: list[_Buffer]) -> Any:
    groups = [buffer.group for buffer in buffers]
    if groups[0] is not None:
        members = [dist.get_process_group_ranks(group) for group in groups]
        if any(ranks != members[0] for ranks in members):
            _refuse(wrapper, "parameters are partitioned over several process groups", "turn expert parallelism off")
    return groups[0]


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where runs of `sizes` elements begin that are laid end to end."""
    return list(accumulate(sizes, initial=0))[:-1]


def _addresses(tensors: Iterable[Tensor], buffer: Tensor, starts: list[int]) -> list[tuple[Tensor, int]]:
    """Each tensor, and its address if it is a view of `buffer` from element `start` on."""
    begin, size = buffer.data_ptr(), buffer.element_size()
    return [(tensor, begin + start * size) for tensor, start in zip(tensors, starts, strict=True)]


def _world_if_none(group: Any) -> Any:
    """None is a name of the group of all ranks; here it would say that nothing is partitioned."""
    return dist.group.WORLD if group is None else group


def _check_lengths(wrapper: Any, *lists: Sequence[Any]) -> None:
    if len({len(each) for each in lists}) != 1:
        _contradiction(wrapper, f"its lists of groups differ in length: {[len(each) for each in lists]}")


def _get(owner: Any, attribute: str, wrapper: Any = None) -> Any:
    """``owner.attribute``; `owner` is the wrapper, or a parameter of `wrapper`."""
    try:
        return getattr(owner, attribute)
    except AttributeError:
        whose = "it" if wrapper is None else _name(wrapper, owner)
        _contradiction(owner if wrapper is None else wrapper, f"{whose} has no attribute {attribute!r}")


def _name(wrapper: Any, param: Any) -> str:
    names = getattr(wrapper, "param_names", None)
    if isinstance(names, dict) and param in names:
        return repr(names[param])
    return f"an unnamed parameter of shape {tuple(getattr(param, 'ds_shape', param.shape))}"


def _contradiction(wrapper: Any, what: str) -> NoReturn:
    _refuse(wrapper, what, f"use deepspeed {TESTED_VERSION}, or DDP or stage 0 in fp32, which need no such records")


def _refuse(wrapper: Any, what: str, remedy: str) -> NoReturn:
    version = getattr(sys.modules.get("deepspeed"), "__version__", "(not imported)")
    raise RuntimeError(
        f"cannot tell which parameters lie where in the tensors of {type(wrapper).__name__}, deepspeed {version}: "
        f"{what}. Compressing them on a guess would mix up parameters: {remedy}"
    )
