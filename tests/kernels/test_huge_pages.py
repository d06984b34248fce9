"""Large tables and states lie in memory for which huge pages were asked, where the system has them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sketch import Policy, RowWise, Rule, compress
from lightning_sketch.kernels.huge_pages import HUGE_PAGE, full, move_there

CPU = torch.device("cpu")


def flags(address: int) -> list[str]:
    """What Linux was told of the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


def has_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform == "linux" and setting.exists() and "[never]" not in setting.read_text()


def asked_for(tensor: torch.Tensor) -> bool:
    return "hg" in flags(tensor.data_ptr() + tensor.nbytes // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, HUGE_PAGE), (5 * HUGE_PAGE + 3,)], ids=str)
def test_full_is_torchs(shape, dtype):
    found = full(shape, 0.5, dtype, CPU)
    assert found.dtype == dtype
    assert torch.equal(found, torch.full(shape, 0.5, dtype=dtype))


def test_nothing_is_allocated_on_the_meta_device():
    assert full((1 << 40,), 0.0, torch.float32, torch.device("meta")).is_meta


def converted() -> tuple[nn.Embedding, torch.optim.Optimizer]:
    table = nn.Embedding(4 * HUGE_PAGE, 1, sparse=True)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.5)
    return table, compress(optimizer, table, Policy([Rule(role="embedding", sum=RowWise())]))


def test_large_states_ask_for_huge_pages():
    _, optimizer = converted()
    (state,) = optimizer.state.values()
    assert asked_for(state["sum_row"]) == has_huge_pages()
    assert torch.equal(state["sum_row"], torch.zeros(4 * HUGE_PAGE))


def test_tables_and_loaded_states_move_there_at_the_first_step():
    table, optimizer = converted()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = table.weight.detach().clone()
    touched = torch.tensor([0, 5, 4 * HUGE_PAGE - 1])
    table(touched).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert asked_for(table.weight) == asked_for(state["sum_row"]) == has_huge_pages()
    expected[touched] -= 0.5
    torch.testing.assert_close(table.weight.detach(), expected, rtol=0, atol=1e-6)


def test_what_cannot_be_moved_is_left_alone():
    small, strided = torch.ones(3), torch.ones(4, HUGE_PAGE).t()
    for tensor in (small, strided, torch.empty(0), torch.empty(HUGE_PAGE, 4, device="meta")):
        move_there(tensor)
    assert (small == 1).all()
    assert (strided == 1).all()
