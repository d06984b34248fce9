"""A model with prescribed gradients on DeepSpeed engines, and the same steps without DeepSpeed.

Gradients are small multiples of a power of two, in every rank's share and in the average, so that neither the order of
a reduction nor a scale nor the dtype they travel in rounds them: what differs, differs in the optimizer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch import CountSketch, Policy, Rule, compress
from lightning_sketch.layers.record import LayerPart
from lightning_sketch.optimizer.bound import BoundPart
from lightning_sketch.rules import run
from lightning_sketch.sharding import Shard
from lightning_sketch.sharding.deepspeed import Segment, read_layout
from lightning_sketch.sharding.gradient import RowGradient
from lightning_sketch.sharding.wrapper import wrapper_of
from tests.deepspeed_tools import engine, init_deepspeed
from tests.tiny import ADAMW, CODECS, Case, assert_same

#: One table for every kind of codec: wide and narrow, more dimensions than two, rows that borders cut.
TABLES: dict[str, tuple[int, ...]] = {
    "sketch": (41, 8), "bf16": (39, 7), "paper": (33, 6), "rows": (29, 9), "sketched_rows": (40, 5),
    "factored": (23, 10), "SM3": (21, 4, 3), "SM3-I_momentum": (30, 7), "lazy": (19, 8),
}  # fmt: skip
#: Kept layers before, between and behind the tables; one with fewer elements than ranks.
SHAPES: dict[str, tuple[int, ...]] = {"first": (5, 2), "scalar": (1,)} | TABLES | {"bias": (13,), "last": (7, 5)}
#: Those with states that ranks share.
SHARED = ("rows", "sketched_rows", "factored", "SM3", "SM3-I_momentum")
TABLE_CODECS = {name: CODECS.get(name.replace("_", " "), {}) for name in TABLES} | {
    "bf16": CODECS["bfloat16"],
    "lazy": {"first_moment": CountSketch(width=64, lazy=True), "second_moment": CountSketch(width=64, lazy=True)},
}


def policy(seed: int = 0, tables: Iterable[str] = TABLES) -> Policy:
    """Every table with its codec, if it has as many rows as the smallest: in zero.Init too."""
    rules = [Rule(name=f"cells.{name}.weight", min_rows=19, **TABLE_CODECS[name]) for name in tables]
    return Policy(rules, seed=seed)


class Cell(nn.Module):
    """One parameter, whose gradient is what it is called with."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient.to(self.weight.dtype)).sum()


class Cells(nn.Module):
    """Independent parameters."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        self.cells = nn.ModuleDict({name: Cell(weight(name, shape)) for name, shape in shapes.items()})

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return sum(cell(gradients[name]) for name, cell in self.cells.items())  # type: ignore[return-value]


#: With two ranks, rank 0 holds the whole of the compressed layer in one group, and all there is in the other.
LOPSIDED = {"rows": (3, 2), "last": (60, 5), "bf16": (1, 2)}


def lopsided_pair() -> tuple[Cells, Any]:
    """A model of these shapes and its converted optimizer."""
    model = Cells(LOPSIDED)
    groups = [[model.cells["rows"].weight, model.cells["last"].weight], [model.cells["bf16"].weight]]
    rules = [Rule(name=f"cells.{name}.*", **CODECS["bfloat16"]) for name in ("rows", "bf16")]
    optimizer = ADAMW.make([{"params": params} for params in groups])
    return model, compress(optimizer, model, Policy(rules))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Initial weights that every dtype here represents."""
    return _numbers(name, shape, -100, 100) / 64


def gradients(step: int, rank: int, world_size: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    """What `rank` contributes in a step: multiples of the world size, and half the rows zero, as tables have it."""
    found = {}
    for name, shape in shapes.items():
        values = _numbers(f"{name} {step} {rank}", shape, -7, 8)
        if len(shape) > 1:
            values *= _numbers(f"{name} {step}", shape[:1], 0, 2).view(-1, *[1] * (len(shape) - 1))
        found[name] = values * world_size / 8
    return found


@cache
def mean_gradients(step: int, world_size: int) -> dict[str, Tensor]:
    """The average over the ranks, not to be modified."""
    by_rank = [gradients(step, rank, world_size) for rank in range(world_size)]
    return {name: sum(g[name] for g in by_rank) / world_size for name in SHAPES}  # type: ignore[misc]


def _numbers(key: str, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randint(low, high, shape, generator=generator).float()


def train(engine: Any, steps: Iterable[int], rank: int, world_size: int, scale: float = 1) -> None:
    """Steps of an engine, with `scale` times the gradients."""
    shapes = {name: shape_of(cell.weight) for name, cell in engine.module.cells.items()}
    for step in steps:
        for share in SHARES[engine.gradient_accumulation_steps()]:
            given = gradients(step, rank, world_size, shapes)
            engine.backward(engine({name: g * scale * share for name, g in given.items()}))
            engine.step()


#: How a step's gradient is spread over micro steps, whose average DeepSpeed takes.
SHARES = {1: (1.0,), 3: (1.5, 0.75, 0.75)}


def shape_of(param: Any) -> tuple[int, ...]:
    """Also where nothing of the parameter is here."""
    return tuple(getattr(param, "ds_shape", param.shape))


def held(engine: Any) -> list[dict[str, Any]]:
    """Every tensor that the optimizer of an engine steps on this rank.

    Returns:
        for each its ``segments`` as ``(fqn, start, length, offset)``, its ``values`` and its ``state``, and whether it
        is the ``whole`` parameter itself.
    """
    wrapper = wrapper_of(engine)
    names = {id(param): name for name, param in engine.module.named_parameters()}
    if wrapper is None:
        whole = [(p, [Segment(p, tuple(p.shape), 0, p.numel(), 0)]) for p in engine.module.parameters()]
        client, tensors = engine.optimizer, whole
    else:
        client, tensors = wrapper.optimizer, read_layout(wrapper).tensors
    return [
        {
            "segments": [(names[id(s.param)], s.start, s.length, s.offset) for s in segments],
            "whole": wrapper is None,
            "values": tensor.detach().clone().flatten(),
            "state": {k: v.clone() if isinstance(v, Tensor) else v for k, v in client.state[tensor].items()},
        }
        for tensor, segments in tensors
    ]


def assemble(
    ranks: Sequence[list[dict[str, Any]]], shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    """Whole parameters from what all ranks hold; NaN where none holds anything."""
    whole = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    for tensor in (tensor for rank in ranks for tensor in rank):
        for fqn, start, length, offset in tensor["segments"]:
            whole[short(fqn)].view(-1)[offset : offset + length] = tensor["values"][start : start + length]
    return whole


def short(fqn: str) -> str:
    """The cell of a parameter."""
    return fqn.split(".")[1]


def one_process(case: Case, steps: Iterable[int], world_size: int, lrs: Sequence[float] = ()) -> tuple[Any, Any]:
    """The averaged gradients stepped by one process.

    Args:
        lrs: of every step, where it changes.

    Returns:
        the model and its converted optimizer.
    """
    model = Cells()
    optimizer = compress(case.make(model.parameters()), model, policy())
    for number, step in enumerate(steps):
        for group in optimizer.param_groups if lrs else ():
            group["lr"] = lrs[number]
        for name, gradient in mean_gradients(step, world_size).items():
            model.cells[name].weight.grad = gradient  # type: ignore[union-attr, assignment]
        optimizer.step()
    return model, optimizer


def pieces(shape: tuple[int, ...], offset: int, length: int) -> list[tuple[int, int, Shard]]:
    """A run of a parameter's elements as ``(begin, end, shard)``: row by row, then whole rows put together."""
    columns, stop = math.prod(shape[1:]), offset + length
    found: list[tuple[int, int, Shard]] = []
    for row in range(offset // columns, -(-stop // columns)):
        begin, end = max(offset, row * columns), min(stop, (row + 1) * columns)
        if end - begin < columns:
            part = Shard(shape, row, 1, part_shape=(end - begin,), column_offset=begin - row * columns)
            found.append((begin, end, part))
        elif found and found[-1][2].part_shape is None:
            first, _, shard = found[-1]
            found[-1] = (first, end, Shard(shape, shard.row_offset, shard.local_rows + 1))
        else:
            found.append((begin, end, Shard(shape, row, 1)))
    return found


def step_piece(
    optimizer: Any, name: str, begin: int, end: int, shard: Shard, steps: Iterable[int], world_size: int
) -> tuple[Tensor, dict[str, Any]]:
    """Step a piece of a table all by itself.

    Args:
        optimizer: a converted optimizer of `Cells`, for its rule, groups and decisions.

    Returns:
        its elements, and its states without any prefix.
    """
    group, layer = next((g, layer) for g, layer, _ in optimizer.compressed_layers() if short(layer.fqn) == name)
    part = LayerPart(layer, shard)
    param = weight(name, SHAPES[name]).flatten()[begin:end].view(shard.local_rows, *shard.row_shape)
    state: dict[str, Any] = part.allocate(param, group)
    for number, step in enumerate(steps, start=1):
        gradient = mean_gradients(step, world_size)[name]
        values = gradient.flatten()[begin:end].view_as(param)
        numbers = optimizer.rule.numbers(group, number)
        bound = BoundPart.bind(part, param, group, state)
        run(optimizer.rule, [bound.step(RowGradient(shard, None, values), numbers, number, maximize=False)])
    return param.flatten(), state


def table_pieces(rank: list[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], str, Tensor, Any]]:
    """Pieces of a table on a rank: the flat tensor, the table's FQN, the elements, and `pieces`'s answer."""
    found = []
    for tensor in rank:
        for fqn, start, length, offset in tensor["segments"]:
            if short(fqn) == name:
                for begin, end, shard in pieces(SHAPES[name], offset, length):
                    values = tensor["values"][start + begin - offset : start + end - offset]
                    found.append((tensor, fqn, values, (begin, end, shard)))
    return found


def assert_alone(rank: list[dict[str, Any]], optimizer: Any, steps: Iterable[int], world_size: int) -> int:
    """Every piece of a table on a rank was trained, and its states are kept, as if it were alone: bit for bit.

    Where ranks share states, as a piece of the table in one process: up to rounding.

    Args:
        rank: what `held` returned there.
        optimizer: a converted optimizer of `Cells` in one process.

    Returns:
        how many elements were compared.
    """
    compared = 0
    for name in compressed(optimizer):
        if name in SHARED and not all(tensor["whole"] for tensor in rank):
            compared += _assert_shared(rank, name, optimizer, steps, world_size)
            continue
        for tensor, fqn, values, (begin, end, shard) in table_pieces(rank, name):
            piece = f"{fqn}[{begin}:{end}]"
            wanted, state = step_piece(optimizer, name, begin, end, shard, steps, world_size)
            assert torch.equal(values, wanted), piece
            prefix = "" if tensor["whole"] else f"{piece}."
            for key, value in state.items():
                assert_same(tensor["state"][prefix + key], value, f"{piece} {key}")
            compared += end - begin
    return compared


def _assert_shared(rank: list[dict[str, Any]], name: str, optimizer: Any, steps: Iterable[int], world_size: int) -> int:
    shape, compared = SHAPES[name], 0
    whole, states = step_piece(optimizer, name, 0, math.prod(shape), Shard.whole(shape), steps, world_size)
    for tensor, fqn, values, (begin, end, shard) in table_pieces(rank, name):
        piece = f"{fqn}[{begin}:{end}]"
        assert_near(values, whole[begin:end], whole, piece)
        for key, expected in states.items():
            if not key.endswith(("_scale", "_row", "_col", "_table")):
                continue  # accumulators of SM3 are each rank's own after a step
            held = tensor["state"][f"{piece}.{key}"]
            if key.endswith("_scale"):
                assert float(held) == float(expected), f"{piece} {key}"
            elif key.endswith("_row"):
                rows = expected[shard.row_offset : shard.row_offset + shard.local_rows]
                assert_near(held, rows, expected, f"{piece} {key}")
            else:
                assert_near(held.flatten(), expected.flatten(), expected, f"{piece} {key}")
        compared += end - begin
    return compared


def assert_near(found: Tensor, expected: Tensor, whole: Tensor, where: str) -> None:
    """Equal up to rounding, relative to the whole tensor."""
    distance = float((found - expected).norm() / whole.norm())
    assert distance < 2e-6, f"{where}: {distance:.1e} apart"


def assert_kept(found: Mapping[str, Tensor], single: tuple[Any, Any], atol: float = 2e-6) -> None:
    """Kept layers are those of one process; torch steps them there, and our rules where they share a flat tensor.

    Args:
        found: from `assemble`.
        single: from `one_process`.
    """
    model, optimizer = single
    for name in SHAPES.keys() - compressed(optimizer):
        wanted = model.cells[name].weight.detach()
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def compressed(optimizer: Any) -> set[str]:
    """The tables that an optimizer compresses: SGD has no second moment, so some are kept."""
    return {short(layer.fqn) for _, layer, _ in optimizer.compressed_layers()}


def refused(
    rank: int, world_size: int, stages: Sequence[int], options: Mapping[str, Any]
) -> dict[int, tuple[str, bool]]:
    """By stage what the first step raises under options of `compress`, and whether any state was made."""
    init_deepspeed(rank, world_size)
    said = {}
    for stage in stages:
        model = Cells()
        optimizer: Any = compress(ADAMW.make(model.parameters()), model, policy(), **options)
        made = engine(model, optimizer, stage)
        try:
            train(made, [0], rank, world_size)
        except RuntimeError as error:
            said[stage] = str(error), any(optimizer.state.values())
    return said
