"""Every example runs as its docstring says, and writes nothing. The demo runs in `test_distribution`, from a wheel."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from tests.gloo import launch
from tests.scripts import run_script

SHARDED = ("accelerate_fsdp2", "fsdp2_lightning")
EXAMPLES = sorted(Path(__file__).parents[1].joinpath("examples").glob("*.py"))
#: They start their processes themselves, Lightning's launcher and torchrun: the command itself is run.
STARTING = ("deepspeed_zero", "fsdp2_lightning")


@functools.cache
def printed_by(path: Path) -> str:
    """What the command on a line of its own in the docstring prints."""
    found = re.search(
        rf"^(python|torchrun --standalone --nproc_per_node (\d)) examples/{path.name}((?: --\w+ \w+)*)",
        docstring(path),
        re.MULTILINE,
    )
    assert found, "the docstring says how to launch it"
    options = found[3].split()
    if path.stem in STARTING:
        assert found[1] == "python"
        return launch([sys.executable, path, *options])
    return run_script(path, *options, world_size=int(found[2] or 0))


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    printed = printed_by(path)
    assert "less than dense" in printed, "it prints what the states cost"
    if path.stem in SHARDED:
        lines = re.findall(r"rank [01]: ([\d,]+) bytes of states", printed)
        held = [int(number.replace(",", "")) for number in lines]
        assert len(held) == 2, "every rank says what it holds"
        assert max(held) < 1.1 * min(held)
    assert list(tmp_path.iterdir()) == [], "working directory"


@pytest.mark.distributed
def test_under_deepspeed_two_processes_hold_half_of_each_table_and_resume_exactly():
    (path,) = [path for path in EXAMPLES if path.stem == "deepspeed_zero"]
    # What the script itself starts.
    assert "torchrun --standalone --nproc_per_node 2 examples/deepspeed_zero.py --stage 3" in docstring(path)
    printed = printed_by(path)
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


@pytest.mark.parametrize(("name", "figure"), [("recommender", "hit rate"), ("extreme_classification", "P@1")])
def test_what_is_held_out_is_found_more_often(name, figure):
    (path,) = [path for path in EXAMPLES if path.stem == name]
    found = [float(number) for number in re.findall(rf"{figure} ([\d.]+)", printed_by(path))]
    assert found[-1] > max(found[0], 0.3)


def test_fine_tuning_resumes_exactly_with_less_than_the_dense_states_of_a_tied_table():
    (path,) = [path for path in EXAMPLES if path.stem == "fine_tuning"]
    printed = printed_by(path)
    assert re.search(r"Factored +│ ", printed)
    assert "weights differ by at most 0 in the end" in printed
