"""What training takes on each rank, before anything is allocated: for models on the meta device, under any engine."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch.activations import Batch, batch_memory
from lightning_sketch.codecs import Codec, Keep
from lightning_sketch.layers.flat import NamedSegment, layer_parts
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.policy.plan import LayerPlan, Plan
from lightning_sketch.policy.policy import PolicyLike, plan
from lightning_sketch.sharding import Cut, Shard
from lightning_sketch.sharding.deepspeed import cut, starts_of, window
from lightning_sketch.sharding.dtensor import even_shard
from lightning_sketch.text import human_bytes, state_rows, table

Engine = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]

# DeepSpeed pads a flat group of ZeRO-1 and -2 to a multiple of this many elements for each rank.
_ZERO_ALIGNMENT = 2


@dataclass
class RankBytes:
    """What one rank holds, bytes.

    Args:
        parameters: of the model.
        copies: fp32 copies that ZeRO's optimizer steps.
        gradients: dense ones, when all exist; sparse ones depend on the batch, and are not counted.
        dense_state: the optimizer's states as torch keeps them, step counts aside.
        state_by_codec: the states under the policy, by codec.
        state_by_layer: the same, by the layer's name.
        activations: of a batch, at the moment when forward and backward hold most: what backward needs, temporaries,
            the batch itself. 0 if there is none.
        gradients_then: the gradients that exist at that moment.
    """

    parameters: int = 0
    copies: int = 0
    gradients: int = 0
    dense_state: int = 0
    state_by_codec: dict[str, int] = field(default_factory=dict)
    state_by_layer: dict[str, int] = field(default_factory=dict)
    activations: int = 0
    gradients_then: int = 0

    @property
    def state(self) -> int:
        """Bytes of all states."""
        return sum(self.state_by_codec.values())

    @property
    def total(self) -> int:
        """Parameters, their copies, gradients and states."""
        return self.parameters + self.copies + self.gradients + self.state

    @property
    def peak(self) -> int:
        """Parameters, their copies and states, and the larger of all gradients and what a batch holds at its peak."""
        return self.total - self.gradients + max(self.gradients, self.activations + self.gradients_then)

    def add_state(self, fqn: str, codec: object, count: int) -> None:
        """Count bytes of a layer's state."""
        name = type(codec).__name__
        self.state_by_codec[name] = self.state_by_codec.get(name, 0) + count
        self.state_by_layer[fqn] = self.state_by_layer.get(fqn, 0) + count


@dataclass(frozen=True)
class Estimate:
    """A plan, and what each rank holds under it; ``str(estimate)`` is the tables.

    Args:
        plan: what the policy does, layer by layer, all ranks together.
        engine: what divides the model over ranks.
        ranks: what each rank holds. Under ZeRO and FSDP2 they differ where shares are uneven.
    """

    plan: Plan
    engine: str
    ranks: tuple[RankBytes, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the layers with codecs and bytes, and what each rank holds."""
        layers = [
            {
                "name": x.layer.fqn,
                "shape": list(x.layer.shape),
                "roles": list(x.roles),
                "rule": x.rule,
                "codecs": {state: codec.to_dict() for state, codec in x.layer.codecs.items()},
                "bytes_before": dict(x.bytes_before),
                "bytes_after": dict(x.bytes_after),
            }
            for x in self.plan.layers
        ]
        return {"engine": self.engine, "layers": layers, "ranks": [asdict(rank) for rank in self.ranks]}

    def __str__(self) -> str:
        """The plan's table, and one of what the fullest rank holds."""
        fullest = max(self.ranks, key=lambda rank: rank.total)
        count = len(self.ranks)
        title = "one process" if count == 1 else f"each of {count} ranks, {self.engine}, at most"
        return f"{self.plan}\n\n{table(title, ('what', '>bytes', ''), _rows(fullest))}"


def _rows(rank: RankBytes) -> Iterator[tuple[str, ...] | None]:
    yield "parameters", human_bytes(rank.parameters), ""
    if rank.copies:
        yield "fp32 copies", human_bytes(rank.copies), "which the optimizer steps"
    yield "gradients", human_bytes(rank.gradients), "dense ones, when all exist"
    yield from state_rows(rank.state_by_codec, rank.dense_state, human_bytes(rank.dense_state))
    if rank.activations:
        then = f"at their peak, when there are {human_bytes(rank.gradients_then)} of gradients"
        yield "activations", human_bytes(rank.activations), then
    yield None
    without = "without temporaries of the step" if rank.activations else "without activations and temporaries"
    yield "together", human_bytes(rank.peak), without


def estimate_memory(
    model: nn.Module,
    optimizer: Optimizer,
    policy: PolicyLike = None,
    *,
    engine: Engine = "ddp",
    world_size: int = 1,
    batch: Batch | None = None,
) -> Estimate:
    """What each rank would hold under ``compress(optimizer, model, policy)``. Allocates nothing.

    State bytes are those of the live optimizer to the byte, but for step counts (4 bytes for each parameter).
    Activations are what torch allocates on the CPU for the same batch; on an accelerator other kernels keep other
    things, and engines add buffers of their own and, under FSDP2 and ZeRO-3, parameters that are gathered.

    Args:
        model: on any device, the meta device included, and not divided yet; its dtype counts.
        optimizer: over parameters of `model`, not converted.
        policy: a policy, its dictionary, or ``None`` for `default_policy()`.
        engine: "ddp", every rank holds everything; "fsdp2", ``fully_shard`` by rows; "zero1", "zero2" and "zero3",
            DeepSpeed's, with its defaults.
        world_size: number of ranks.
        batch: of one rank, to count activations: named inputs in a mapping or positional ones in a sequence, where only
            shapes and dtypes of tensors count, and the loss is ``output["loss"]`` or the sum of a tensor; or a callable
            that gets a copy of the model, on fake tensors, and returns the loss. What the callable makes is fake, too;
            it may use autocast or checkpointing. ``None``: activations are not counted.

    Raises:
        ValueError: `engine` or `world_size` is none, the model cannot run on fake tensors, or as `plan` does.

    >>> with torch.device("meta"):
    ...     model = nn.Embedding(1_000_000_000, 64)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> estimate_memory(model, optimizer, engine="fsdp2", world_size=64).ranks[0].state
    62500264
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r}: must be one of {', '.join(get_args(Engine))}")
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: must be at least 1")
    made = plan(model, optimizer, policy)
    held_by_batch = None if batch is None else batch_memory(model, batch)
    sparse = {key for key, layer in named_layers(model).items() if layer.sparse}
    params = list(model.parameters())
    trained = [param for param in params if param.requires_grad]
    divided = "zero3" if engine == "zero2" else engine  # which divides gradients, too
    groups = [
        (group, list(zip(layers, group["params"], strict=True)))
        for layers, group in zip(made.groups, optimizer.param_groups, strict=True)
    ]
    flat = [_FlatGroup(layers, engine, world_size) for _, layers in groups] if engine.startswith("zero") else []

    def count(rank: int) -> RankBytes:
        found = RankBytes(parameters=sum(_held(p, engine, world_size, rank) * p.element_size() for p in params))
        for group, layers in groups:
            dense = [param for _, param in layers if param.requires_grad and id(param) not in sparse]
            found.gradients += sum(_held(p, divided, world_size, rank) * p.element_size() for p in dense)
            if not flat:
                _count_shards(found, layers, group, engine, world_size, rank)
        for each in flat:
            each.count(found, rank)
        if held_by_batch is not None:
            share = sum(_held(p, divided, world_size, rank) for p in trained) / sum(p.numel() for p in trained)
            found.activations = held_by_batch.activations
            found.gradients_then = round(share * held_by_batch.gradients)
        return found

    alike: dict[Hashable, RankBytes] = {}  # by what ranks hold: most hold as much of everything
    ranks = []
    for rank in range(world_size):
        held: Hashable = tuple(each.kinds(rank) for each in flat)
        if engine == "fsdp2":
            held = tuple(_held(param, engine, world_size, rank) for param in params)
        if held not in alike:
            alike[held] = count(rank)
        ranks.append(alike[held])
    return Estimate(made, engine, tuple(ranks))


_Layers = Sequence[tuple[LayerPlan, Tensor]]


def _count_shards(
    found: RankBytes, layers: _Layers, group: Mapping[str, Any], engine: str, world_size: int, rank: int
) -> None:
    """Under FSDP2 a rank's rows of every layer; else all of it."""
    for planned, param in layers:
        layer, numel = planned.layer, _held(param, engine, world_size, rank)
        shard = Shard.whole(layer.shape)
        if engine == "fsdp2" and layer.shape:
            shard = even_shard(layer.shape, 0, world_size, rank, agree=True)
        for state, codec in layer.codecs.items():
            dense = numel * planned.bytes_before[state] // max(1, param.numel())
            found.dense_state += dense
            if layer.compressed and not planned.stateless:
                spec = LayerPart(layer, shard).spec(state, param, group)
                found.add_state(layer.fqn, codec, codec.nbytes(spec))
            else:
                found.add_state(layer.fqn, codec, dense)


class _FlatGroup:
    """A group whose trainable parameters DeepSpeed lays end to end in one flat fp32 tensor, a share of it a rank.

    Args:
        layers: the group's.
        engine: "zero1", "zero2" or "zero3".
    """

    def __init__(self, layers: _Layers, engine: str, world_size: int) -> None:
        trained = [(planned, param.numel()) for planned, param in layers if param.requires_grad]
        self.layers, sizes = [planned.layer for planned, _ in trained], [size for _, size in trained]
        self.records = [planned.record for planned, _ in trained]
        self.columns = [max(1, math.prod(layer.shape[1:])) for layer in self.layers]
        self.cut: Cut | None = "anywhere" if world_size > 1 else None
        if engine == "zero3":
            parts = [-(-size // world_size) for size in sizes]
            self.length = sum(parts)
            self.pieces = functools.partial(cut, starts_of(parts), sizes, parts)
        else:
            self.length = -(-sum(sizes) // (_ZERO_ALIGNMENT * world_size)) * _ZERO_ALIGNMENT
            self.pieces = functools.partial(window, starts_of(sizes), sizes, self.length)

    def kinds(self, rank: int) -> tuple[tuple[int, int, int], ...]:
        """A rank's pieces: of which layer, in which column each begins, and how many elements it has."""
        return tuple((i, offset % self.columns[i], numel) for i, _, numel, offset in self.pieces(rank))

    def count(self, found: RankBytes, rank: int) -> None:
        """Add what a rank holds of the flat tensor."""
        if not self.layers:
            return
        states = self.layers[0].codecs
        found.copies += 4 * self.length
        found.dense_state += 4 * self.length * len(states)
        if not any(self.records):  # torch's own step has the tensor, padding included
            found.add_state(f"{self.layers[0].fqn} ...", Keep(), 4 * self.length * len(states))
            return
        for i, column, numel in self.kinds(rank):
            record = self.records[i]
            if record is None:  # kept layers side by side are stepped as one
                found.add_state("kept layers", Keep(), 4 * numel * len(states))
                continue
            for codec, count in _bytes_of_piece(record, column, numel, self.cut):
                found.add_state(self.layers[i].fqn, codec, count)


@functools.lru_cache(maxsize=1 << 16)
def _bytes_of_piece(record: str, column: int, numel: int, cut: Cut | None) -> tuple[tuple[Codec, int], ...]:
    """The states of some elements of a compressed layer in a flat tensor; the same whichever row they begin in.

    Args:
        column: where in that row.
    """
    layer = LayerRecord.from_record(record)
    segment = NamedSegment(layer.fqn, layer.shape, 0, numel, column)
    flat = torch.empty(numel, device="meta")
    parts = list(layer_parts(layer, segment, cut))
    return tuple(
        (codec, sum(codec.nbytes(part.spec(state, flat, {})) for part in parts))
        for state, codec in layer.codecs.items()
    )


def _held(param: Tensor, engine: str, world_size: int, rank: int) -> int:
    """Elements of a parameter that a rank holds."""
    if engine == "zero3":
        return -(-param.numel() // world_size)
    if engine == "fsdp2" and param.ndim:
        shard = even_shard(tuple(param.shape), 0, world_size, rank)
        return shard.local_rows * math.prod(shard.row_shape)
    return param.numel()
