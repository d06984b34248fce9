"""Every example runs as its docstring says, and writes nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parents[1].joinpath("examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "less than dense" in run.stdout, "it prints what the states cost"
    assert list(tmp_path.iterdir()) == [], "working directory"
