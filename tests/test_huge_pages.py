"""Large states lie in memory for which huge pages were asked, where the system has them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sketch import Policy, RowWise, Rule, compress
from lightning_sketch.huge_pages import HUGE_PAGE, full

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
    return sys.platform == "linux" and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, HUGE_PAGE), (5 * HUGE_PAGE + 3,)], ids=str)
def test_full_is_torchs(shape, dtype):
    found = full(shape, 0.5, dtype, CPU)
    assert found.dtype == dtype
    assert torch.equal(found, torch.full(shape, 0.5, dtype=dtype))


def test_nothing_is_allocated_on_the_meta_device():
    assert full((1 << 40,), 0.0, torch.float32, torch.device("meta")).is_meta


def test_large_states_ask_for_huge_pages():
    table = nn.Embedding(4 * HUGE_PAGE, 1, sparse=True)
    optimizer = compress(
        torch.optim.Adagrad(table.parameters()), table, Policy([Rule(role="embedding", sum=RowWise())])
    )
    (state,) = optimizer.state.values()
    asked = "hg" in flags(state["sum_row"].data_ptr() + state["sum_row"].nbytes // 2)
    assert asked == has_huge_pages()
    assert torch.equal(state["sum_row"], torch.zeros(4 * HUGE_PAGE))
