"""Many small layers as DTensors with prescribed gradients, and the same layers in one process."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch import Policy, Rule, compress
from lightning_sketch.layers.record import RECORDS, LayerPart, LayerRecord
from lightning_sketch.optimizer.bound import BoundPart
from lightning_sketch.rules import run
from lightning_sketch.sharding import local
from lightning_sketch.sharding.dtensor import even_shard
from lightning_sketch.sharding.gradient import RowGradient
from tests.tiny import CODECS, FOR_SGD, Case

#: Rows and columns that divide evenly among 2 or 3 ranks, and that do not; fewer rows than ranks, so that some hold
#: nothing; three dimensions.
SHAPES = ((51, 6), (2, 5), (17, 4, 3))
DIMS = (0, 1)


def codecs_for(case: Case) -> list[str]:
    return [name for name in CODECS if str(case) != "SGD" or name in FOR_SGD]


def layer_name(dim: int, shape: Iterable[int]) -> str:
    return f"by{dim}_" + "x".join(map(str, shape))


def keys(case: Case) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Codec, sharded dimension and shape of every layer, in the optimizer's order."""
    for codec in codecs_for(case):
        for dim in DIMS:
            for shape in SHAPES:
                yield codec, dim, shape


def chunk(tensor: Tensor, world_size: int, rank: int, dim: int) -> Tensor:
    """What a rank holds, by the definition: ``torch.chunk``, and nothing where there are fewer chunks."""
    parts = tensor.chunk(world_size, dim)
    return (parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)).contiguous()


def as_dtensor(full: Tensor, mesh: Any, dim: int) -> Any:
    """A DTensor over a one-dimensional mesh from the whole tensor, which every rank has."""
    from torch.distributed.tensor import DTensor, Shard

    held = chunk(full, mesh.size(), mesh.get_local_rank(), dim)
    return DTensor.from_local(held, mesh, [Shard(dim)], run_check=False, shape=full.shape, stride=full.stride())


class Layers(nn.Module):
    """One parameter per codec, dimension and shape; DTensors if there is a mesh."""

    def __init__(self, case: Case, mesh: Any = None) -> None:
        super().__init__()
        self.codecs = nn.ModuleDict({f"as {codec}": nn.ParameterDict() for codec in codecs_for(case)})
        generator = torch.Generator().manual_seed(0)
        for codec, dim, shape in keys(case):
            full = torch.randn(shape, generator=generator)
            held = full if mesh is None else as_dtensor(full, mesh, dim)
            self.codecs[f"as {codec}"][layer_name(dim, shape)] = nn.Parameter(held)


def policy_for(case: Case) -> Policy:
    return Policy([Rule(name=f"codecs.as {codec}.*", **CODECS[codec]) for codec in codecs_for(case)])


def full_gradients(case: Case, step: int) -> list[Tensor]:
    """The gradient of every layer in this step, whole; a third of the rows is absent, another third each step."""
    return _gradients(tuple(shape for _, _, shape in keys(case)), step)


@functools.cache
def _gradients(shapes: tuple[tuple[int, ...], ...], step: int) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(step + 1))
    found = []
    for shape, part in zip(shapes, values.split(sizes), strict=True):
        absent = (torch.arange(shape[0]) + step) % 3 == 0
        found.append(part.view(shape).masked_fill(absent.view(-1, *[1] * (len(shape) - 1)), 0.0))
    return found


def train_layers(case: Case, steps: int, mesh: Any = None) -> tuple[Layers, Any]:
    """Train all layers of an optimizer with the prescribed gradients."""
    model = Layers(case, mesh)
    optimizer = compress(case.make(model.parameters()), model, policy_for(case))
    for step in range(steps):
        for param, grad, (_, dim, _) in zip(model.parameters(), full_gradients(case, step), keys(case), strict=True):
            param.grad = grad.clone() if mesh is None else as_dtensor(grad, mesh, dim)
        optimizer.step()
    return model, optimizer


def train_shard(
    case: Case, optimizer: Any, position: int, world_size: int, rank: int, steps: int
) -> tuple[Tensor, dict[str, Any]]:
    """Train one rank's part of one layer alone, by the shard's own step, without DTensors or processes.

    Args:
        optimizer: any converted optimizer of these layers; gives the group and the layer's record.
        position: of the layer among `keys`.

    Returns:
        the part's parameter and states.
    """
    _, dim, shape = list(keys(case))[position]
    group = optimizer.param_groups[0]
    layer = LayerRecord.from_record(group[RECORDS][position])
    part = LayerPart(layer, even_shard(shape, dim, world_size, rank))
    initial = list(Layers(case).parameters())[position].detach()
    param = chunk(initial, world_size, rank, dim)
    state: dict[str, Any] = {"step": torch.tensor(0.0)} | part.allocate(param, group)
    for step in range(steps):
        state["step"] += 1
        grad = chunk(full_gradients(case, step)[position], world_size, rank, dim)
        numbers = optimizer.rule.numbers(group, step + 1)
        bound = BoundPart.bind(part, param, group, state)
        run(optimizer.rule, [bound.step(RowGradient(part.shard, None, grad), numbers, step + 1, maximize=False)])
    return param, state


# Training through `fully_shard`

ROWS, COLUMNS = 51, 6
RULES: dict[str, dict[str, Any]] = {name: CODECS[name] for name in CODECS if name not in ("paper", "SM3-I momentum")}


class Net(nn.Module):
    """Tables of every codec, one sharded by rows and one by columns; a table of two rows; kept layers."""

    def __init__(self) -> None:
        super().__init__()
        self.by_rows = nn.ModuleList(nn.Embedding(ROWS, COLUMNS) for _ in RULES)
        self.by_columns = nn.ModuleList(nn.Embedding(ROWS, COLUMNS) for _ in RULES)
        self.small = nn.Embedding(2, COLUMNS)
        self.hidden = nn.Linear(COLUMNS, COLUMNS)
        self.head = nn.Linear(COLUMNS, ROWS)

    def forward(self, tokens: Tensor) -> Tensor:
        tables: Any = (*self.by_rows, *self.by_columns)
        found = sum(table(tokens) for table in tables) + self.small(tokens % 2)
        return self.head(self.hidden(found).tanh())  # type: ignore[no-any-return]


def net_policy(seed: int = 0) -> Policy:
    """No rule names the head and the biases: they are kept."""
    rules = [
        Rule(name=f"{cut}.{number}.weight", **codecs)
        for cut in ("by_rows", "by_columns")
        for number, codecs in enumerate(RULES.values())
    ]
    # lazy, and on some ranks without rows
    small = Rule(name="small.weight", **CODECS["exact"])
    return Policy([*rules, small, Rule(name="hidden.weight", **CODECS["factored"])], seed=seed)


def make_net(mesh: Any = None, seed: int = 0, **options: Any) -> Net:
    """`Net` under ``fully_shard`` if there is a mesh."""
    torch.manual_seed(seed)
    model = Net()
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        columns = {id(table.weight) for table in model.by_columns}
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if id(p) in columns else 0), **options)
    return model


def tokens_of(rank: int, step: int) -> Tensor:
    """A rank's batch; some rows are frequent."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (torch.rand(8, generator=generator) ** 2 * ROWS).long()


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    tokens = tokens_of(rank, step)
    return nn.functional.cross_entropy(model(tokens).float(), (tokens + 1) % ROWS)


def train_net(model: nn.Module, optimizer: Any, rank: int, steps: Iterable[int]) -> list[float]:
    """Train on a rank's own data; the losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_as(world_size: int, model: nn.Module, optimizer: Any, steps: Iterable[int]) -> list[float]:
    """The same training in one process: the mean gradient of all ranks' data; the mean losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        found = [loss_of(model, rank, step) for rank in range(world_size)]
        (sum(found[1:], found[0]) / world_size).backward()
        optimizer.step()
        losses.append(sum(float(loss.detach()) for loss in found) / world_size)
    return losses


def held(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Copies of this rank's parameters and states, by name."""
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        found[name] = local(param.detach()).clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}.{key}"] = local(value).clone() if isinstance(value, Tensor) else value
    return found
