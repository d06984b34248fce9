"""Optimizers of N ranks in one process, for :mod:`benchmarks.shards_quality`: tables in row shards, as under FSDP2.

Why it is the computation of N processes: each rank is a thread with a process group, a mesh and DTensors of its own,
whose local tensors are its rows of the table, and an ordinary converted optimizer over them. What it does in a step is
what it does in a process, but for the collective in which the ranks agree: that is of torch's "threaded" backend, which
stacks the tensors of all threads and adds them up. So sums may differ from gloo's or NCCL's in the last place for more
than two ranks; `tests/test_simulated_ranks.py` holds two to gloo's, bit for bit. FSDP2 itself has no part in it: what
it hands to a rank's optimizer is its rows of the gradient that was averaged over all ranks, and here they are views of
one process's gradient. One thread runs at a time: they hand over while they wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.testing._internal.distributed import multi_threaded_pg as threaded

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
        for name, embedding in self.named_children():
            embedding.weight.grad = rows_of(gradients[name], mesh)


def rows_of(whole: Tensor, mesh: Any) -> Any:
    """A rank's rows of a tensor as a DTensor, cut as `fully_shard` does. Shares memory."""
    parts = whole.detach().chunk(mesh.size())
    rank = mesh.get_local_rank()
    held = parts[rank] if rank < len(parts) else whole.detach()[:0]
    return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


class SimulatedRanks:
    """The tables' optimizer of all ranks: as much of an `Optimizer` as a training loop calls.

    Args:
        tables: whole, by name; steps modify them in place.
        ranks: how many.
        make: called by every rank.
        lr: the first learning rate.

    Attributes:
        param_groups: one, with the learning rate that all ranks step by.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], ranks: int, make: MakeOptimizer, lr: float) -> None:
        self.tables, self.ranks, self.make = tables, ranks, make
        self.param_groups = [{"lr": lr}]
        self._barrier = threading.Barrier(ranks + 1)
        self._turn = threading.Lock()
        self._errors: list[BaseException] = []
        self._stopped = False

    @contextmanager
    def running(self) -> Iterator[SimulatedRanks]:
        """With the ranks' threads."""
        store = dist.HashStore()
        with _threaded_groups(self._turn):
            threads = [threading.Thread(target=self._rank, args=(rank, store)) for rank in range(self.ranks)]
            for thread in threads:
                thread.start()
            try:
                self._meet()  # every rank has its optimizer
                yield self
            finally:
                self._stopped = True
                with suppress(RuntimeError):  # which `step` has raised
                    self._meet()
                for thread in threads:
                    thread.join()

    def step(self) -> None:
        """Every rank steps its rows by its part of the tables' gradients.

        Raises:
            RuntimeError: a rank failed; its error is the cause.
        """
        self._meet()
        self._meet()

    def zero_grad(self) -> None:
        """Forget the tables' gradients."""
        for table in self.tables.values():
            table.grad = None

    def _meet(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RuntimeError("a simulated rank failed") from (self._errors[0] if self._errors else None)

    def _rank(self, rank: int, store: Any) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=self.ranks, store=store)
            mesh = init_device_mesh("cpu", (self.ranks,))
            with self._turn:
                module = Tables(self.tables, mesh)
                optimizer = self.make(module)
            self._barrier.wait()
            while True:
                self._barrier.wait()
                if self._stopped:
                    return
                with self._turn:
                    self._step(module, optimizer, mesh)
                self._barrier.wait()
        except threading.BrokenBarrierError:
            return
        except BaseException as error:
            self._errors.append(error)
            self._barrier.abort()
            threaded.ProcessLocalGroup.exception_handle(error)  # for those that wait in a collective

    def _step(self, module: Tables, optimizer: Optimizer, mesh: Any) -> None:
        module.take({name: table.grad for name, table in self.tables.items()}, mesh)
        for group in optimizer.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        optimizer.step()


@contextmanager
def _threaded_groups(turn: threading.Lock) -> Iterator[None]:
    """Process groups of threads; a thread that waits for the others in an all-reduce gives up its turn."""
    all_reduce = threaded.ProcessLocalGroup.allreduce

    def handing_over(self: Any, *args: Any, **options: Any) -> Any:
        turn.release()
        try:
            return all_reduce(self, *args, **options)
        finally:
            turn.acquire()

    threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded.ProcessLocalGroup.allreduce = handing_over
    try:
        yield
    finally:
        threaded.ProcessLocalGroup.allreduce = all_reduce
        threaded.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
