"""Steps that ranks agree on: every rank comes to the same collectives, whatever gradients it has."""

from __future__ import annotations

import functools
import os
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from lightning_sketch import SM3, BFloat16, Drop, Factored, Keep, Policy, RowWise, Rule, compress, report
from tests.fsdp2.tools import as_dtensor, chunk
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:NaN or inf in the gradient")]

SHAPE, ONE_ROW = (12, 6), (1, 6)
SECOND = {"sketched": RowWise(compression=3), "rows": RowWise(), "factored": Factored(), "sm3": SM3()}
POLICY = Policy([Rule(name=f"{name}*", exp_avg=Keep(), exp_avg_sq=codec) for name, codec in SECOND.items()])


def make(mesh: Any, dim: int = 0, policy: Policy = POLICY, **options: Any) -> tuple[nn.ParameterDict, Any]:
    """A layer of every codec; of the first also one of a single row."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(SECOND, SHAPE) | {"sketched_row": ONE_ROW}
    wholes = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    held = {name: x if mesh is None else as_dtensor(x, mesh, dim) for name, x in wholes.items()}
    params = nn.ParameterDict({name: nn.Parameter(x) for name, x in held.items()})
    return params, compress(AdamW(params.parameters(), lr=0.1), params, policy, **options)


def give(params: nn.ParameterDict, step: int, mesh: Any, dim: int = 0, bad: tuple[int, int] | None = None) -> None:
    """Gradients, with a NaN at one place of each table."""
    for number, param in enumerate(params.values()):
        full = torch.randn(tuple(param.shape), generator=torch.Generator().manual_seed(100 * step + number))
        if bad is not None and len(full) > 1:
            full[bad] = torch.nan
        param.grad = full if mesh is None else as_dtensor(full, mesh, dim)


def held(params: nn.ParameterDict, optimizer: Any) -> dict[str, Tensor]:
    """Copies of what this rank holds."""
    found = {}
    for name, param in params.items():
        found[name] = (param.to_local() if hasattr(param, "to_local") else param).detach().clone()
        found |= {f"{name}.{key}": value.clone() for key, value in optimizer.state.get(param, {}).items()}
    return found


@contextmanager
def counted(found: list[int]) -> Any:
    """Numbers in each all-reduce."""
    original = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield
    finally:
        dist.all_reduce = original


def without_gradients(mesh: Any, rank: int) -> dict[str, Any]:
    """Steps in which a layer has a gradient on some ranks, on none, or never."""
    params, optimizer = make(mesh)
    params["rows"].requires_grad_(False)
    for step in range(2):
        give(params, step, mesh)
        params["rows"].grad = None
        optimizer.step()
    found = {"two steps": held(params, optimizer), "frozen": params["rows"] in optimizer.state}
    give(params, 2, mesh)
    for name in ("sketched", "factored", "sm3"):
        params[name].grad = params[name].grad if rank == 0 else None
    params["sketched_row"].grad = params["rows"].grad = None
    optimizer.step()
    found["some"] = held(params, optimizer)
    optimizer.zero_grad()
    numbers: list[int] = []
    with counted(numbers):
        optimizer.step()
    return found | {"none": held(params, optimizer), "all-reduces": numbers}


def first_gradient_elsewhere(mesh: Any, rank: int) -> dict[str, Any]:
    """The first gradient of a layer comes on one rank only."""
    params, optimizer = make(mesh)
    give(params, 0, mesh)
    if rank == 1:
        optimizer.zero_grad()
    optimizer.step()
    give(params, 1, mesh)
    optimizer.step()
    return held(params, optimizer)


def not_finite(mesh: Any, dim: int, bad: tuple[int, int] | None) -> dict[str, Any]:
    params, optimizer = make(mesh, dim, nonfinite="skip")
    for step in range(3):
        give(params, step, mesh, dim, bad if step == 1 else None)
        optimizer.step()
    return held(params, optimizer) | {"skipped": dict(report(optimizer).skipped)}


def accumulated(mesh: Any, rank: int) -> dict[str, Any]:
    """One rank sums two micro-batches, the other three."""
    params, optimizer = make(mesh)
    for micro in range(2 + rank):
        before = [param.grad for param in params.values()]
        give(params, micro, mesh)
        for param, grad in zip(params.values(), before, strict=True):
            param.grad = param.grad if grad is None else param.grad + grad
    optimizer.step()
    return held(params, optimizer)


def two_optimizers(mesh: Any) -> list[dict[str, Any]]:
    """They take turns, with more steps of the second."""
    (first, one), (second, other) = make(mesh), make(mesh, 1)
    for step in range(4):
        give(second, step, mesh, 1)
        other.step()
        if step % 2:
            give(first, step // 2, mesh)
            one.step()
    return [held(first, one), held(second, other)]


def trained(mesh: Any, dim: int = 0, steps: int = 3) -> dict[str, Any]:
    params, optimizer = make(mesh, dim)
    for step in range(steps):
        give(params, step, mesh, dim)
        optimizer.step()
    return held(params, optimizer)


def collectives(mesh: Any) -> dict[str, list[int]]:
    """Numbers in each all-reduce of a step, by policy."""
    found: dict[str, list[int]] = {}
    policies = {
        "all": POLICY,
        "no SM3": Policy([Rule(exp_avg=Drop(), exp_avg_sq=RowWise(compression=3))]),
        "nothing shared": Policy([Rule(exp_avg=BFloat16(), exp_avg_sq=RowWise())]),
    }
    for name, policy in policies.items():
        params, optimizer = make(mesh, policy=policy)
        give(params, 0, mesh)
        optimizer.step()
        give(params, 1, mesh)
        with counted(found.setdefault(name, [])):
            optimizer.step()
    return found


def scaled(mesh: Any, rank: int) -> list[float]:
    """A gradient scaler over a model under ``fully_shard``, of whose gradient one rank's shard overflows."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    fully_shard(model, mesh=mesh)
    optimizer = compress(AdamW(model.parameters()), model, Policy([Rule(name="*.weight", exp_avg_sq=Factored())]))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).sum()).backward()
        if step == 1 and rank == 1:
            model[0].weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        counts.append(float(optimizer.state[model[0].weight]["step"]))
    return [*counts, scaler.get_scale()]


def failing(rank: int, world_size: int) -> dict[str, Any]:
    """One rank fails in the middle of a step."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    params, optimizer = make(DeviceMesh.from_group(group, "cpu"))
    mesh = params["rows"].device_mesh
    give(params, 0, mesh)
    optimizer.step()
    before = held(params, optimizer)
    give(params, 1, mesh)
    if rank == 1:
        optimizer.rule.coupled_weight_decay = None  # what observes the gradient asks for it
    message = ""
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
    after = held(params, optimizer)
    return {"message": message, "same": all(torch.equal(before[key], after[key]) for key in before)}


def everything(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    found = {
        "without": without_gradients(mesh, rank),
        "first elsewhere": first_gradient_elsewhere(mesh, rank),
        "not finite": [not_finite(mesh, dim, bad) for dim, bad in ((0, (7, 2)), (1, (7, 2)), (1, (3, 5)))],
        "accumulated": accumulated(mesh, rank),
        "two": two_optimizers(mesh),
        "collectives": collectives(mesh),
        "scaled": scaled(mesh, rank),
        "trained": trained(mesh),
    }
    # Once more in a process group that was made anew, and in which every collective is compared between ranks.
    dist.destroy_process_group()
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    found["again"] = [trained(mesh), without_gradients(mesh, rank), two_optimizers(mesh)]
    return found


@functools.cache
def ranks() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(everything, 2, folder)


def assert_one_process(found: list[dict[str, Any]], whole: dict[str, Any], dim: int = 0) -> None:
    for rank, here in enumerate(found):
        for name in (*SECOND, "sketched_row"):
            torch.testing.assert_close(here[name], chunk(whole[name], len(found), rank, dim), rtol=1e-5, atol=1e-6)


SHARED = ("sketched.exp_avg_sq_table", "factored.exp_avg_sq_col")


def test_a_layer_with_a_gradient_on_some_ranks_is_stepped_on_all():
    first, second = (found["without"] for found in ranks())
    for key in SHARED:
        assert torch.equal(first["some"][key], second["some"][key])
        assert not torch.equal(first["some"][key], first["two steps"][key])
    for found in (first, second):
        assert [float(found["some"][f"{name}.step"]) for name in ("sketched", "factored", "sm3")] == [3, 3, 3]
    assert torch.equal(second["some"]["sketched"], second["two steps"]["sketched"]), "its rows have no gradient"
    assert not torch.equal(first["some"]["sketched"], first["two steps"]["sketched"])


def test_a_layer_without_a_gradient_on_any_rank_is_not_stepped():
    for found in (found["without"] for found in ranks()):
        assert not found["frozen"], "it has no state, either"
        assert float(found["some"]["sketched_row.step"]) == 2
        assert all(torch.equal(found["none"][key], found["some"][key]) for key in found["some"])
        assert len(found["all-reduces"]) == 2, "but its ranks agree that there is none"


def test_the_first_gradient_may_come_on_another_rank():
    first, second = (found["first elsewhere"] for found in ranks())
    assert float(first["sketched.step"]) == float(second["sketched.step"]) == 2
    for key in SHARED:
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize(("number", "dim", "bad"), [(0, 0, (7, 2)), (1, 1, (7, 2)), (2, 1, (3, 5))])
def test_a_row_that_is_not_finite_on_one_rank_is_left_out_of_all(number, dim, bad):
    whole = not_finite(None, dim, bad)
    found = [found["not finite"][number] for found in ranks()]
    assert_one_process(found, whole, dim)
    torch.testing.assert_close(found[0][SHARED[0]], whole[SHARED[0]], rtol=1e-5, atol=1e-9)
    for here in found if dim == 1 else found[1:]:  # all of them know of it where they share the row
        assert here["skipped"] == whole["skipped"] == dict.fromkeys(SECOND, 1)


def test_ranks_may_accumulate_over_different_numbers_of_micro_batches():
    first, second = (found["accumulated"] for found in ranks())
    for key in SHARED:
        assert torch.equal(first[key], second[key])


def test_two_optimizers_take_turns():
    by_rows, by_columns = trained(None, 0, 2), trained(None, 1, 4)
    assert_one_process([found["two"][0] for found in ranks()], by_rows)
    assert_one_process([found["two"][1] for found in ranks()], by_columns, 1)


def test_a_process_group_may_be_made_anew():
    whole = trained(None)
    assert_one_process([found["trained"] for found in ranks()], whole)
    assert_one_process([found["again"][0] for found in ranks()], whole)
    for found in ranks():
        for key, value in found["without"]["some"].items():
            assert torch.equal(found["again"][1]["some"][key], value), key
        for again, before in zip(found["again"][2], found["two"], strict=True):
            assert all(torch.equal(again[key], before[key]) for key in before)


def test_a_step_is_one_all_reduce_and_with_sm3_two():
    for found in (found["collectives"] for found in ranks()):
        # a flag for each layer, and a sketch of 3 x 2, of the single row nothing, and the columns of Factored
        assert found["all"] == [3 + 3 * 2 + 6, 6]
        assert found["no SM3"] == [4 + 4 * 3 * 2]
        assert found["nothing shared"] == []


def test_a_gradient_scaler_skips_a_step_on_all_ranks_or_on_none():
    for found in ranks():
        assert found["scaled"] == [1, 1, 2, 2.0]


def test_where_one_rank_fails_the_others_end_with_an_error_and_nothing_changed():
    first, second = run_ranks(failing, 2)
    assert second["message"].startswith("TypeError")
    assert first["message"].startswith("RuntimeError: the ranks could not agree on a step of compressed layers")
    assert first["same"]
    assert second["same"]
