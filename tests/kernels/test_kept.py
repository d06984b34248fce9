"""What a layer's kernels keep from one step to the next is used as long as it holds, and no longer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.optim import AdamW, Optimizer

from lightning_sketch import SM3, BFloat16, Codec, CountSketch, Factored, Keep, Policy, RowWise, Rule, compress
from tests.ranks import run_ranks
from tests.tiny import assert_same, snapshot

STEPS = 6
CODECS: dict[str, tuple[Codec, Codec]] = {
    "RowWise": (Keep(), RowWise()),
    "SM3": (BFloat16(), SM3()),
    "Factored": (BFloat16(stochastic=False), Factored()),
    "CountSketch": (CountSketch(width=5), CountSketch(width=5)),
    "lazy": (BFloat16(), CountSketch(width=5, lazy=True)),
}

Happens = Callable[[nn.Embedding, Optimizer, int], None]


def _train(codecs: tuple[Codec, Codec], happens: Happens, *, forget: bool) -> dict[str, Tensor]:
    """Parameters and states after some steps; what was kept is forgotten before each of them, or not."""
    torch.manual_seed(0)
    model = nn.Embedding(20, 8)
    policy = Policy([Rule(name="weight", first_moment=codecs[0], second_moment=codecs[1])])
    optimizer = compress(AdamW(model.parameters(), lr=0.1), model, policy)
    for step in range(STEPS):
        model.weight.grad = torch.randn(20, 8)
        happens(model, optimizer, step)
        if forget:
            optimizer.compression.bindings.clear()
        optimizer.step()
    return snapshot(model, optimizer)


def _nothing(model: nn.Embedding, optimizer: Optimizer, step: int) -> None:
    pass


def _sparse_by_turns(model: nn.Embedding, optimizer: Optimizer, step: int) -> None:
    if step % 3:
        ids = torch.tensor([[1, 4, 19][:step]])
        model.weight.grad = torch.sparse_coo_tensor(ids, torch.randn(ids.shape[1], 8), (20, 8))


def _states_in_another_order(model: nn.Embedding, optimizer: Optimizer, step: int) -> None:
    """The same tensors, whose memory is laid out otherwise at every other step."""
    for value in optimizer.state[model.weight].values():
        if isinstance(value, Tensor) and value.ndim > 1:
            value.data = value.data.mT.contiguous().mT if step % 2 else value.data.contiguous()


def _other_numbers(model: nn.Embedding, optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    group["lr"], group["betas"], group["eps"] = 0.1 / (step + 1), (0.9 - 0.1 * step, 0.99), 1e-8 * (step + 1)
    group["weight_decay"], group["maximize"] = 0.1 * step, step == 4


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("happens", [_nothing, _sparse_by_turns, _states_in_another_order, _other_numbers])
def test_steps_are_those_of_an_optimizer_that_forgets(codecs: tuple[Codec, Codec], happens: Happens) -> None:
    assert_same(_train(codecs, happens, forget=False), _train(codecs, happens, forget=True))


def _other_shards(rank: int, world_size: int) -> list[str]:
    """What is said about a DTensor whose local tensor is another one, of another size, after some steps."""
    mesh = init_device_mesh("cpu", (world_size,))
    said = []
    for nonfinite in ("raise", "propagate"):
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.randn(20, 8), mesh, [Split(0)]))
        policy = Policy([Rule(second_moment=RowWise())])
        optimizer = compress(AdamW(model.parameters()), model, policy, nonfinite=nonfinite)
        for step in range(3):
            model.weight.grad = distribute_tensor(torch.ones(20, 8), mesh, [Split(0)])
            if step == 2:
                model.weight._local_tensor = torch.ones(7, 8)
            try:
                optimizer.step()
            except RuntimeError as error:
                said.append(f"{step}: {error}")
    return said


def test_a_dtensor_that_holds_something_else_is_asked_anew() -> None:
    for said in run_ranks(_other_shards, 2):
        assert len(said) == 2
        assert all("should hold [10, 8] here, but holds [7, 8]" in error and error.startswith("2: ") for error in said)


def _judged(rank: int, world_size: int) -> list[list[float]]:
    """Rows of a DTensor after steps, in the last of which one rank's gradient is not finite."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Split(0)]))
    policy = Policy([Rule(second_moment=RowWise())])
    optimizer = compress(AdamW(model.parameters()), model, policy, nonfinite="skip")
    found = []
    for step in range(4):
        grad = torch.full((2, 2), float("nan") if step == 3 and rank == 1 else 1.0)
        model.weight.grad = DTensor.from_local(grad, mesh, [Split(0)])
        optimizer.step()
        found.append(model.weight.full_tensor().flatten().tolist())
    return found


@pytest.mark.filterwarnings("ignore:NaN or inf")
def test_a_rank_leaves_out_its_own_rows_of_a_dtensor() -> None:
    for found in run_ranks(_judged, 2):
        assert found[0] != found[1] != found[2]
        assert all(x != y for x, y in zip(found[3][:4], found[2][:4], strict=True))
        assert found[3][4:] == found[2][4:]


def _with_another_group(rank: int, world_size: int) -> list[list[float]]:
    """Rows of a DTensor after steps, before and after the process groups were made anew."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Split(0)]))
    optimizer = compress(AdamW(model.parameters()), model, Policy([Rule(second_moment=RowWise())]))
    model.weight.grad = distribute_tensor(torch.ones(4, 2), mesh, [Split(0)])
    found = []
    for _ in range(2):
        optimizer.step()
        found.append(model.weight.to_local().flatten().tolist())
    place = [tempfile.mkdtemp()]
    dist.broadcast_object_list(place)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{place[0]}/store", rank=rank, world_size=world_size)
    optimizer.step()
    found.append(model.weight.to_local().flatten().tolist())
    return found


def test_a_destroyed_process_group_is_not_kept() -> None:
    for found in run_ranks(_with_another_group, 2):
        assert found[0] != found[1] != found[2]
