"""The DeepSpeed example on two processes, started as its docstring says."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.gloo import launch

EXAMPLE = Path(__file__).parents[1] / "examples/deepspeed_zero.py"


@pytest.mark.distributed
def test_two_processes_hold_half_of_each_table_and_resume_exactly():
    assert "torchrun --standalone --nproc_per_node 2 examples/deepspeed_zero.py" in ast.get_docstring(
        ast.parse(EXAMPLE.read_text())
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, EXAMPLE, "--stage", "3"]
    printed = launch(command)
    ranges = re.findall(r"(\S+): rows (\S+) to (\S+)", printed.replace(",", ""))
    assert [name for name, *_ in ranges] == ["table.weight", "head.weight"] * 2, "on each rank"
    for (_, first, last), (_, following, _) in (ranges[::2], ranges[1::2]):
        assert first == "0"
        assert int(following) - int(last) in (1, 2), "next to each other, or with a row between that the border cuts"
    assert printed.count(" less than dense") == 2, "of each rank"
    found = re.search(r"next 20 steps (\S+), and from the checkpoint (\S+)", printed)
    assert found[1] == found[2]
    before = [float(loss) for loss in re.findall(r"steps \d+ to \d+: loss (\S+)", printed)]
    assert before[0] > before[1] > float(found[1])
