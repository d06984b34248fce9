"""Optimizers of N ranks in one process, for :mod:`benchmarks.shards_quality`: tables in row shards, as under FSDP2.

Why it is the computation of N processes: each rank has DTensors over a mesh of N, whose local tensors are its rows of
the table, and an ordinary converted optimizer over them. What it does in a step is what it does in a process, but for
the collective in which the ranks agree. There a rank that comes before the others is ended by an exception, as by a
timeout, which leaves its states as they were (`lightning_sketch.optimizer.agree`); when all ranks have come, what they
sent is added up, and each makes its step again, with the sums. So sums may differ from gloo's or NCCL's in the last
place for more than two ranks; `tests/test_simulated_ranks.py` holds two to gloo's, bit for bit. FSDP2 itself has no
part in it: what it hands to a rank's optimizer is its rows of the gradient that was averaged over all ranks, and here
they are views of one process's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

#: Makes the converted optimizer of one rank, of a module with nothing but its tables.
MakeOptimizer = Callable[[nn.Module], Optimizer]


class Tables(nn.Module):
    """One embedding for each table, of a rank's rows of it."""

    def __init__(self, tables: Mapping[str, Tensor], mesh: Any) -> None:
        super().__init__()
        for name, table in tables.items():
            with torch.device("meta"):
                embedding = nn.Embedding(*table.shape)
            embedding.weight = nn.Parameter(rows_of(table, mesh))
            self.add_module(name, embedding)

    def take(self, gradients: Mapping[str, Tensor], mesh: Any) -> None:
        """Give every table its rows of a gradient."""
        for name, embedding in self.named_children():
            embedding.weight.grad = rows_of(gradients[name], mesh)


def rows_of(whole: Tensor, mesh: Any) -> Any:
    """A rank's rows of a tensor as a DTensor, cut as `fully_shard` does. Shares memory."""
    parts = whole.detach().chunk(mesh.size())
    rank = mesh.get_local_rank()
    held = parts[rank] if rank < len(parts) else whole.detach()[:0]
    return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


class SimulatedRanks:
    """The tables' optimizers of all ranks: as much of an `Optimizer` as a training loop calls.

    Args:
        tables: whole, by name; steps modify them in place.
        ranks: how many.
        make: called for every rank.

    Attributes:
        param_groups: one, with the learning rate that all ranks step by.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], ranks: int, make: MakeOptimizer) -> None:
        self.tables = tables
        self._ranks = [_Rank(tables, rank, ranks, make) for rank in range(ranks)]
        self.param_groups = [{"lr": self._ranks[0].optimizer.param_groups[0]["lr"]}]

    def step(self) -> None:
        """Every rank steps its rows by its part of the tables' gradients."""
        gradients = {name: table.grad for name, table in self.tables.items() if table.grad is not None}
        for rank in self._ranks:
            rank.prepare(gradients, self.param_groups[0]["lr"])
        agreed: list[Tensor] = []
        while waiting := [found for rank in self._ranks if (found := rank.step(agreed)) is not None]:
            assert len(waiting) == len(self._ranks), "ranks come to the same collectives"
            numbers = torch.stack([each.numbers for each in waiting])
            agreed.append(numbers.amax(dim=0) if waiting[0].op == dist.ReduceOp.MAX else numbers.sum(dim=0))

    def zero_grad(self) -> None:
        """Forget the tables' gradients."""
        for table in self.tables.values():
            table.grad = None


class _Rank:
    def __init__(self, tables: Mapping[str, Tensor], rank: int, ranks: int, make: MakeOptimizer) -> None:
        self.world = c10d._World()
        with self._acting():
            dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
            self.mesh = init_device_mesh("cpu", (ranks,))
            self.module = Tables(tables, self.mesh)
            self.optimizer = make(self.module)

    def prepare(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        with self._acting():
            self.module.take(gradients, self.mesh)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, agreed: list[Tensor]) -> _Waits | None:
        """Make the step; what this rank sends if it comes to a collective that is not among those `agreed` on."""
        results = iter(agreed)

        def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
            if (result := next(results, None)) is None:
                raise _Waits(tensor, op)
            tensor.copy_(result)

        original, dist.all_reduce = dist.all_reduce, all_reduce
        try:
            with self._acting():
                self.optimizer.step()
        except _Waits as waits:
            return waits
        finally:
            dist.all_reduce = original
        return None

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """With torch's process groups those of this rank."""
        before, c10d._world = c10d._world, self.world
        try:
            yield
        finally:
            c10d._world = before


class _Waits(Exception):
    """A rank has come to a collective before the others."""

    def __init__(self, numbers: Tensor, op: Any) -> None:
        super().__init__()
        self.numbers, self.op = numbers, op
