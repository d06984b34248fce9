"""Every example runs as its docstring says, and writes nothing; the demo writes its figures and its picture."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gloo import launch

SHARDED = ("accelerate_fsdp2", "fsdp2_lightning")
EXAMPLES = sorted(Path(__file__).parents[1].joinpath("examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = launch(command(path))
    assert "less than dense" in printed, "it prints what the states cost"
    if path.stem in SHARDED:
        lines = re.findall(r"rank [01]: ([\d,]+) bytes of states", printed)
        held = [int(number.replace(",", "")) for number in lines]
        assert len(held) == 2, "every rank says what it holds"
        assert max(held) < 1.1 * min(held)
    assert list(tmp_path.iterdir()) == [], "working directory"


def command(path: Path) -> list[Any]:
    """The command on a line of its own in the docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    found = re.search(rf"^(python|torchrun .*) examples/{path.name}((?: --\w+ \w+)*)", docstring, re.MULTILINE)
    assert found, "the docstring says how to launch it"
    launcher = found[1].replace("torchrun", "-m torch.distributed.run").removeprefix("python").split()
    return [sys.executable, *launcher, path, *found[2].split()]


def test_the_demo_compares_two_trainings(tmp_path):
    script = Path(__file__).parents[1] / "examples/demo/run.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "--fast", "--out", tmp_path / "demo"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "perplexity" in run.stdout
    results = json.loads((tmp_path / "demo/results.json").read_text())
    plain, compressed = results["as_it_is"], results["compressed"]
    assert compressed["bytes"]["parameters"] == plain["bytes"]["parameters"]
    assert compressed["bytes"]["optimizer_state"] < plain["bytes"]["optimizer_state"] / 5
    assert len(compressed["train_loss"]) == len(plain["train_loss"]) == results["settings"]["steps"]
    assert (tmp_path / "demo/report.png").read_bytes().startswith(b"\x89PNG")
