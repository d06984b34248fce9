"""The same small training under every engine, with checkpoints written by each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from lightning_sketch import (
    SM3,
    BFloat16,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
)
from tests.codecs.halves import Halves
from tests.deepspeed_tools import engine

ROWS, DIM, STEPS = 37, 12, 4

#: A codec pair for each of the tables; the head and the vectors are kept.
TABLES: dict[str, dict[str, Any]] = {
    "sketch": {"exp_avg": CountSketch(compression=3), "exp_avg_sq": CountSketch(compression=3)},
    "exact": {"exp_avg": CountSketch(width=1 << 20), "exp_avg_sq": CountSketch(width=1 << 20)},
    "default": {"exp_avg": Drop(), "exp_avg_sq": Factored(floor=1.0)},
    "rows": {"exp_avg": Drop(), "exp_avg_sq": RowWise()},
    "sketched_rows": {"exp_avg": Keep(), "exp_avg_sq": RowWise(compression=4)},
    "rounded": {"exp_avg": BFloat16(), "exp_avg_sq": BFloat16()},
    "sm3": {"exp_avg": Keep(), "exp_avg_sq": SM3()},
    "factored": {"exp_avg": BFloat16(), "exp_avg_sq": Factored()},
    "quantized": {"exp_avg": Quantized(bits=4, block=16), "exp_avg_sq": Quantized()},
    "not_ours": {"exp_avg": Halves(), "exp_avg_sq": Halves(relative=False)},
}
POLICY = Policy([Rule(name=f"{name}.*", **codecs) for name, codecs in TABLES.items()])


class Prescribed(nn.Module):
    """Parameters whose part of the loss is linear in them, so that their gradients are prescribed."""

    def __init__(self, first: int, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.first = first  # position of the first parameter in the model
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, step: int) -> Tensor:
        terms = [
            (param * gradient(param.shape, step, self.first + i)).sum() for i, param in enumerate(self.parameters())
        ]
        return torch.stack(terms).sum()


class Model(nn.Module):
    """Tables, by their names, and a kept layer."""

    def __init__(self, tables: Collection[str]) -> None:
        super().__init__()
        for position, name in enumerate(tables):
            self.add_module(name, Prescribed(position, weight=(ROWS, DIM)))
        self.head = Prescribed(len(tables), weight=(5, DIM), bias=(5,))

    def forward(self, step: int) -> Tensor:
        return torch.stack([part(step) for part in self.children()]).sum()


def gradient(shape: Any, step: int, position: int) -> Tensor:
    """The gradient of a parameter at a step, on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + position)
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) ** 3  # some rows are frequent
    return torch.randn(shape, generator=generator) * rows


def fresh_model(tables: Collection[str] = TABLES) -> Model:
    torch.manual_seed(0)
    return Model(tables)


def optimizer_of(model: nn.Module, policy: Policy | None = POLICY, separate: bool = False) -> AdamW:
    """AdamW, with one group or, if `separate`, one for each layer."""
    groups = [{"params": list(layer.parameters())} for layer in model.children()]
    optimizer = AdamW(groups if separate else model.parameters(), lr=0.01)
    return optimizer if policy is None else compress(optimizer, model, policy)


@dataclass
class Run:
    """A training under one engine."""

    kind: str  # "single", "ddp", "rows", "columns", "grid", "zero1" ...
    model: Model
    optimizer: Any
    engine: Any = None
    replica: nn.Module | None = None  # what DDP makes of the model

    @property
    def target(self) -> Any:
        """What `restore` is given."""
        return self.optimizer if self.engine is None else self.engine

    def train(self, steps: range) -> None:
        for step in steps:
            if self.engine is not None:
                self.engine.backward(self.engine(step))
                self.engine.step()
                continue
            if self.replica is not None:
                self.optimizer.zero_grad()
                self.replica(step).backward()
                self.optimizer.step()
                continue
            for position, param in enumerate(self.model.parameters()):
                full = gradient(param.shape, step, position)
                sharded = isinstance(param, DTensor)
                param.grad = distribute_tensor(full, param.device_mesh, param.placements) if sharded else full
            self.optimizer.step()

    def save(self, path: Path) -> None:
        """By the engine's own means."""
        if self.engine is not None:
            self.engine.save_checkpoint(str(path), tag="step")
        elif self.kind == "ddp":
            if dist.get_rank() == 0:
                torch.save(self.optimizer.state_dict(), path)
            dist.barrier()
        elif self.kind == "single":
            torch.save(self.optimizer.state_dict(), path)
        else:
            dcp.save({"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}, checkpoint_id=path)


def on_a_grid(model: nn.Module) -> None:
    """Columns cut by tensor parallelism and then by FSDP2, on half of the ranks each way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    for module in list(model.modules()):
        for name, param in list(module.named_parameters(recurse=False)):
            placement = ShardPlacement(1) if param.ndim > 1 else Replicate()
            setattr(module, name, nn.Parameter(distribute_tensor(param.detach(), mesh["tensor"], [placement])))
    fully_shard(model, mesh=mesh["data"], shard_placement_fn=lambda p: ShardPlacement(min(1, p.ndim - 1)))


def make(kind: str, policy: Policy | None = POLICY, separate: bool = False, tables: Collection[str] = TABLES) -> Run:
    """A fresh training under an engine; DeepSpeed must have been initialised for "zero1", "zero2" and "zero3"."""
    model = fresh_model(tables)
    if kind == "grid":
        on_a_grid(model)
    if kind in ("rows", "columns"):
        dim = 0 if kind == "rows" else 1
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: ShardPlacement(dim if p.ndim > 1 else 0))
    optimizer = optimizer_of(model, policy, separate)
    if kind.startswith("zero"):
        return Run(kind, model, optimizer, engine(model, optimizer, int(kind[-1])))
    return Run(kind, model, optimizer, replica=DistributedDataParallel(model) if kind == "ddp" else None)
