"""The Triton kernels in Triton's interpreter, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

HERE = Path(__file__).parent
LIMIT = 1800  # seconds: each takes one minute
#: Files whose tests run in one process: in as many as take equally long.
INTERPRETED = (
    ("interpreted",),
    ("left_out", "bytes", "orders", "repeated"),
    ("quantized", "on_device", "agreed", "observe"),
)


@pytest.mark.parametrize("subjects", INTERPRETED, ids=" ".join)
def test_kernels_equal_the_reference_in_the_interpreter(subjects: tuple[str, ...]) -> None:
    quicker = ["-p", "tests.kernels.triton_interpreter"]
    run_apart(*quicker, *(f"triton_{subject}.py" for subject in subjects), TRITON_INTERPRET="1")


def run_apart(*arguments: str, **environment: str) -> str:
    """Run tests with these options, of files that lie here, and return what was printed."""
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    found = [str(HERE / each) if each.endswith(".py") else each for each in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *found],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout
